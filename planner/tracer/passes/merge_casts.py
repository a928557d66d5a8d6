"""Merge autocast's casts of one weight into one, and sum its gradient as eager does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from planner.errors import CaptureError
from planner.tracer.casts import TO_COPY
from planner.tracer.passes.graph import TracedGraph

_ADD = torch.ops.aten.add.Tensor


def merge_casts(traced: TracedGraph) -> None:
    """Give every leaf that autocast casts several times one cast, and its gradient one cast back.

    Raises:
        CaptureError: the order in which eager sums the gradient cannot be found.
    """
    for leaf, position in traced.gradients:
        groups: dict[Any, list[fx.Node]] = {}
        for user in leaf.users:
            if user.target is TO_COPY and user in traced.casts:
                groups.setdefault((traced.casts[user], user.kwargs.get("dtype")), []).append(user)
        for casts in groups.values():
            if len(casts) > 1:
                _merge(traced, leaf, casts, position)


def _merge(traced: TracedGraph, leaf: fx.Node, casts: Sequence[fx.Node], position: int) -> None:
    graph = traced.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(casts, key=order.__getitem__)
    uses = {cast.meta.get("seq_nr") for cast in casts}
    root = traced.results[position]
    terms = _terms(root)
    back = [term for term in terms if term.target is TO_COPY and term.meta.get("seq_nr") in uses and order[term] > order[first]]
    others = [term for term in terms if term not in back]
    for cast in casts:
        if cast is not first:
            cast.replace_all_uses_with(first)
            graph.erase_node(cast)
    if len(back) < 2:
        return
    if len(others) > 1:
        raise CaptureError(
            f"{leaf.name} is used several times under autocast and several times without; the order in which eager sums its "
            "gradients cannot be told from the trace. Use autocast(..., cache_enabled=False)"
        )
    if traced.uses.get(leaf, 0) > 0:
        traced.uses[leaf] += 1 - len(back)
    total = back[0].all_input_nodes[0]
    for before, term in itertools.pairwise(back):
        with graph.inserting_after(max(before, term, key=order.__getitem__)):
            total = _called(traced, _ADD, (total, term.all_input_nodes[0]), {}, term)
        order[total] = max(order[before], order[term])
    last = max(back, key=order.__getitem__)
    with graph.inserting_after(total):
        total = _called(traced, TO_COPY, (total,), dict(last.kwargs), last)
    if others:
        later = others[0] if order[others[0]] > order[last] else total
        with graph.inserting_after(later):
            total = _called(traced, _ADD, (total, others[0]), {}, last)
    returned = list(traced.results)
    returned[position] = total
    traced.results = returned


def _called(traced: TracedGraph, target: Any, args: tuple[fx.Node, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
    node = traced.graph.call_function(target, args, kwargs)
    traced.copy_facts(node, like)
    vals = [arg.meta["val"] for arg in args]
    with vals[0].fake_mode:
        node.meta["val"] = target(*vals, **kwargs)
    return node


def _terms(root: fx.Node | None) -> list[fx.Node]:
    """What a gradient is the sum of, in the order of summation."""
    if root is None:
        return []
    if root.target is _ADD and not root.kwargs and len(root.users) == 1 and all(isinstance(a, fx.Node) for a in root.args):
        left, right = root.args
        return [*_terms(left), *_terms(right)]  # type: ignore[arg-type]
    return [root]
