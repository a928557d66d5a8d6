"""Ranks of a distributed job that communicate inside a planned step must run the same plan: they compare before the first step.

A planned step runs its collectives once each in the captured order, so planned and unplanned ranks match. Their order relative
to other collectives, such as DistributedDataParallel's, depends on the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import torch
from torch import fx

from planner._compat.collectives import key_value_store, ranks_of_group
from planner.errors import RanksDifferError
from planner.graph.structure import fingerprint
from planner.kernels.facts import is_collective
from planner.results.plan import Plan
from planner.runtime.step import RewrittenStep
from planner.tracer.joint import Joint

_TIMEOUT = timedelta(seconds=10)
_counts: Counter[str] = Counter()
"""Per process group and graph: how many planned modules have been compared."""


def communicates(joint: Joint) -> bool:
    """Whether the captured step holds collectives."""
    return any(is_collective(node) for node in joint.graph.nodes if node.op == "call_function")


def compare_plans(step: RewrittenStep, plan: Plan) -> None:
    """Publish this rank's plan in each process group that the step communicates in, and read the other ranks' plans.

    To be called before a module's first planned step. It uses the process group's key-value store, not a collective, so it
    does not hang where another rank runs unplanned. It waits up to 10 s; a rank that comes later reads this rank's entry.

    Raises:
        RanksDifferError: another rank runs another plan of the same graph.
    """
    store = key_value_store()
    if store is None:
        return
    graph = fingerprint(plan.graph, arguments=False)
    rows = [graph, list(plan.solution.schedule.steps), step.num_stages, torch.__version__]
    mine = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    for group in _groups(step.joint):
        ranks, own = ranks_of_group(group)
        place = f"checkpoint-planner/{group}/{graph}"
        _counts[place] += 1
        keys = {rank: f"{place}/{_counts[place]}/{rank}" for rank in ranks}
        store.set(keys[own], mine)
        with suppress(RuntimeError):  # DistStoreError: a rank has not published yet
            store.wait([*keys.values()], _TIMEOUT)
        for rank in ranks:
            theirs = store.get(keys[rank]).decode() if store.check([keys[rank]]) else mine
            if theirs != mine:
                raise RanksDifferError(
                    f"ranks {own} and {rank} run different plans ({mine} and {theirs}) of a step that communicates: their "
                    "costs were measured separately, or their budgets differ. Plan on rank 0, planned.plan.save(path), and on "
                    "every rank apply(planner.Plan.load(path), model, args)"
                )


def _groups(joint: Joint) -> list[str]:
    """Names of the process groups; "" for the default group, where an operator names none."""
    nodes = [node for node in joint.graph.nodes if node.op == "call_function" and is_collective(node)]
    return sorted({name for node in nodes if (name := _group(node)) is not None})


def _group(node: fx.Node) -> str | None:
    """The name of the group that a collective runs in; None for a wait."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if "group_name" in given:
        return str(given["group_name"])
    return None if getattr(node.target, "namespace", "").startswith("_c10d") else ""
