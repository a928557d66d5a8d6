"""Order the kernels: the forward's first, then the backward's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import ancestors


def order_forward(traced: TracedGraph) -> None:
    """Move what the forward's results need before the first kernel that reads an incoming gradient; note the last one.

    Functionalization makes a new view of what was written in place where it is next read, possibly after the backward.
    """
    pairs = zip(traced.roles, traced.results, strict=True)
    forward_results = [*(node for role, node in pairs if role[0] != "gradient"), *traced.forward_checks]
    tangents = [node for role, node in traced.placeholders.items() if role[0] == "tangent"]
    _move_up(traced.graph, forward_results, tangents)
    needed = ancestors(forward_results)
    calls = (node for node in reversed(traced.graph.nodes) if node in needed and node.op == "call_function")
    traced.last_forward = next(calls, None)


def _move_up(graph: fx.Graph, forward_results: Iterable[fx.Node], tangents: Iterable[fx.Node]) -> None:
    needed, reached = ancestors(forward_results), set(tangents)
    first: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op == "call_function" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            first = first or node
        elif first is not None and node in needed:
            first.prepend(node)
