"""A smaller graph with the same plans, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx

from planner.graph.graph import Graph, Op
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator

_TINY = 2e-6
"""Values below this share of all forward bytes are kept for every budget."""


@dataclass(frozen=True, eq=False)
class Coarse:
    """A coarse graph, for each of its ops the original ops it stands for, and the values too small to decide about."""

    graph: Graph
    groups: tuple[tuple[int, ...], ...]
    tiny: frozenset[str]

    @cached_property
    def simulator(self) -> Simulator:
        """Of the coarse graph."""
        return Simulator(self.graph)


def coarsen(graph: Graph) -> Coarse:
    """Merge neighbours u, v of the forward where nobody but v reads u, and v's values are no larger than u's.

    Keeping u is then never better than keeping v. Only direct neighbours merge, so the order is
    the captured one; what lives between them becomes workspace.
    """
    return Coarse(*_merge(graph), tiny_values(graph))


def uncoarsened(graph: Graph) -> Coarse:
    """The graph as it is: nothing merged, every value decided about."""
    return Coarse(graph, tuple((i,) for i in range(len(graph.ops))), frozenset())


def tiny_values(graph: Graph) -> frozenset[str]:
    """Forward values too small to be worth a decision."""
    written = [name for op in graph.ops[: graph.num_forward_ops] for name in op.writes]
    threshold = _TINY * sum(graph.value[name].nbytes for name in written)
    return frozenset(name for name in written if graph.value[name].nbytes <= threshold)


def expand(schedule: Schedule, groups: tuple[tuple[int, ...], ...]) -> Schedule:
    """The schedule of the original graph that runs every group where the coarse schedule runs its op."""
    return Schedule(tuple(i for step in schedule.steps for i in groups[step]))


def _merge(graph: Graph) -> tuple[Graph, tuple[tuple[int, ...], ...]]:
    producers = graph.producer.keys()
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(range(len(graph.ops)))
    flow.add_edges_from((graph.producer[name], i) for i, op in enumerate(graph.ops) for name in op.reads if name in producers)
    nbytes = {value.name: 0 if value.name in graph.pinned else value.nbytes for value in graph.values}

    merged: list[tuple[Op, tuple[int, ...]]] = []
    for i, op in enumerate(graph.ops):
        group: tuple[int, ...] = (i,)
        while i < graph.num_forward_ops and merged and _mergeable(flow, nbytes, graph, merged[-1], (op, group)):
            first, inner = merged.pop()
            op, group = _join(first, op, graph), inner + group
        merged.append((op, group))

    ops = tuple(op for op, _ in merged)
    written = {name for op in ops for name in op.writes} | set(graph.inputs)
    coarse = replace(
        graph,
        ops=ops,
        values=tuple(value for value in graph.values if value.name in written),
        num_forward_ops=sum(group[-1] < graph.num_forward_ops for _, group in merged),
    )
    return coarse, tuple(group for _, group in merged)


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
