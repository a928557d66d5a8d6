"""Captured steps compared node for node, but for the nodes' names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

from planner.graph.structure import fingerprint, first_difference
from planner.kernels.observed import TRACED
from planner.tracer.joint import Joint
from planner.tracer.lower import lower
from planner.tracer.units import trace


@contextmanager
def units_off() -> Iterator[None]:
    """While entered, every block of a model is traced."""
    with mock.patch.object(trace, "candidates", lambda *_: {}):
        yield


def difference(one: Joint, other: Joint) -> str:
    """Where two captured steps differ first; '' where they differ in node names alone.

    Kernels with their arguments and how they were traced, fake tensors down to storages, sources, and the rest of a Joint.
    """
    rows, others = _rows(one), _rows(other)
    for i, (mine, theirs) in enumerate(zip(rows, others, strict=False)):
        if mine != theirs:
            return f"node {i}: " + "; ".join(f"{a} != {b}" for a, b in zip(mine, theirs, strict=True) if a != b)
    if len(rows) != len(others):
        return f"{len(rows)} nodes and {len(others)}"
    rest, rest_there = _rest(one), _rest(other)
    for key, value in rest.items():
        if value != rest_there[key]:
            return f"{key}: {str(value)[:300]} != {str(rest_there[key])[:300]}"
    graph, there = lower(one), lower(other)
    return "" if fingerprint(graph) == fingerprint(there) else first_difference(graph, there)


def _rows(joint: Joint) -> list[tuple[Any, ...]]:
    number: dict[fx.Node, int] = {}
    storages: dict[int, int] = {}

    def look(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        storage = value.untyped_storage()
        at = storages.setdefault(storage._cdata, len(storages))
        form = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, str(value.device))
        return type(value).__name__, *form, at, storage.nbytes()

    rows = []
    for i, node in enumerate(joint.graph.nodes):
        number[node] = i
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda arg: f"%{number[arg]}")
        target = "" if node.op == "placeholder" else str(node.target)
        made = () if node.op == "output" else pytree.tree_map(look, node.meta["val"])
        rows.append((node.op, target, repr(arguments), made, joint.sources.get(node.name), node.meta.get(TRACED)))
    return rows


def _rest(joint: Joint) -> dict[str, Any]:
    at = {node.name: i for i, node in enumerate(joint.graph.nodes)}
    guards = None
    if joint.guards is not None:
        kept = [node for node in joint.guards.nodes if node.target is not torch.ops.aten.detach.default]
        guards = [(node.op, at[node.name] if node.op == "placeholder" else str(node.target)) for node in kept]
    return {
        "inputs": [(at[given.node], given.kind, given.key, given.mutated) for given in joint.inputs],
        "outputs": [repr(output) for output in (*joint.outputs, *joint.left)],
        "results": [at[name] for name in joint.results],
        "gradients": [(at[given.node], at[name]) for given, name in joint.gradients],
        "states of random generators": {at[kernel]: at[state] for kernel, state in joint.rng_states.items()},
        "forward nodes": joint.num_forward_nodes,
        "constants": [at[name] for name in joint.constants],
        "guards": guards,
        "host reads": [(read.value, read.source) for read in joint.host_reads],
        "recorded": repr(joint.recorded),
        "weights": joint.weights,
        "effects": repr(joint.host.effects),
        "saved handles": sorted(at[name] for name in joint.saved_handles),
    }
