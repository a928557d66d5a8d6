"""A smaller graph with the same plans, for reference programs that no large graph allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import networkx as nx

from planner.graph.graph import Graph, Op


def merged(graph: Graph) -> Graph:
    """The graph with neighbours u, v of its forward merged where nobody but v reads u, and v's values are no larger than u's.

    Keeping u is then never better than keeping v. What lives between them becomes workspace.
    """
    producers = graph.producer.keys()
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(range(len(graph.ops)))
    flow.add_edges_from((graph.producer[name], i) for i, op in enumerate(graph.ops) for name in op.reads if name in producers)
    nbytes = {value.name: 0 if value.name in graph.pinned else value.nbytes for value in graph.values}

    found: list[tuple[Op, tuple[int, ...]]] = []
    for i, op in enumerate(graph.ops):
        group: tuple[int, ...] = (i,)
        while i < graph.num_forward_ops and found and _mergeable(flow, nbytes, graph, found[-1], (op, group)):
            first, inner = found.pop()
            op, group = _join(first, op, graph), inner + group
        found.append((op, group))

    ops = tuple(op for op, _ in found)
    written = {name for op in ops for name in op.writes} | set(graph.inputs)
    return replace(
        graph,
        ops=ops,
        values=tuple(value for value in graph.values if value.name in written),
        num_forward_ops=sum(group[-1] < graph.num_forward_ops for _, group in found),
    )


def _mergeable(
    flow: nx.DiGraph[int],
    nbytes: Mapping[str, int],
    graph: Graph,
    first: tuple[Op, tuple[int, ...]],
    second: tuple[Op, tuple[int, ...]],
) -> bool:
    (u, inner), (v, group) = first, second
    readers = set(flow.successors(inner[-1]))
    return (
        bool(readers)
        and readers <= set(group)
        and not graph.pinned.intersection(u.writes)
        and sum(nbytes[name] for name in v.writes) <= sum(nbytes[name] for name in u.writes if name in v.reads)
    )


def _join(u: Op, v: Op, graph: Graph) -> Op:
    """One op that runs u, then v; what u writes is gone afterwards."""

    def size(op: Op) -> int:
        return sum(graph.value[name].nbytes for name in op.writes)

    during_u = size(u) + u.workspace_bytes - size(v)
    during_v = sum(graph.value[name].nbytes for name in u.writes if name in v.reads) + v.workspace_bytes
    return Op(
        name=v.name,
        nodes=u.nodes + v.nodes,
        reads=tuple(dict.fromkeys((*u.reads, *(name for name in v.reads if name not in u.writes)))),
        writes=v.writes,
        cost_ns=u.cost_ns + v.cost_ns,
        workspace_bytes=max(0, during_u, during_v),
        recomputable=u.recomputable and v.recomputable,
        source=v.source or u.source,
    )
