"""From the values that are kept to the schedule: recompute just before need, each forward op at most once more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule


def lazy_schedule(graph: Graph, kept: Collection[str], later: Mapping[int, Collection[str]] | None = None) -> Schedule:
    """The plain step in which every forward value outside `kept` is recomputed right before the backward op that needs it.

    What is not available is recomputed with everything it needs that is not available either, in
    captured order, and is available from then on. Resident values, outputs and values of ops that
    must not run again count as kept. `later`: while these backward ops run, these values are available and no others.
    """
    forward_end = graph.num_forward_ops
    once = (op for i, op in enumerate(graph.ops) if i >= forward_end or not op.recomputable)
    constant = graph.pinned.union(name for op in once for name in op.writes)
    available = set(kept) | constant
    steps = list(range(forward_end))
    for p in graph.backward_ops:
        wanted = [*graph.ops[p].reads, *later.get(p, ())] if later else graph.ops[p].reads
        missing = [name for name in wanted if name not in available]
        reruns: set[int] = set()
        while missing:
            i = graph.producer[missing.pop()]
            if i not in reruns:
                reruns.add(i)
                missing += [name for name in graph.ops[i].reads if name not in available]
        for i in sorted(reruns):
            available.update(graph.ops[i].writes)
        if later and p in later:
            available &= constant.union(later[p])
        steps += [*sorted(reruns), p]
    return Schedule(tuple(steps))
