"""Which forward values a plan decides about, how long they are wanted, and the bytes that no decision changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Lifetimes:
    """The droppable values d of a graph: written by the forward, no outputs, and wanted by the backward,
    directly or to recompute another. Times are op indices of the plain step.

    Attributes:
        names: the droppable values; all arrays below but `base` have one entry for each.
        nbytes: s_d.
        producer: pi(d).
        last_forward: the last forward op that reads d (its producer where none does).
        first_use, last_use: the first and last backward op that reads d (len(ops) and -1 where none does).
        base: per op, bytes live while it runs, with one forward in flight, that no decision changes (droppable values it
            reads excluded in the backward).
    """

    names: tuple[str, ...]
    nbytes: Ints
    producer: Ints
    last_forward: Ints
    first_use: Ints
    last_use: Ints
    base: Ints


def lifetimes(graph: Graph) -> Lifetimes:
    """Read the droppable values of a graph."""
    end, forward_end = len(graph.ops), graph.num_forward_ops
    last_forward: dict[str, int] = {}
    uses: dict[str, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in op.reads:
            if i < forward_end:
                last_forward[name] = i
            else:
                uses.setdefault(name, []).append(i)

    wanted = set(uses)
    for op in reversed(graph.ops[:forward_end]):
        if op.recomputable and not wanted.isdisjoint(set(op.writes) - graph.pinned):
            wanted.update(op.reads)
    names = tuple(name for op in graph.ops[:forward_end] for name in op.writes if name in wanted and name not in graph.pinned)

    def array(entries: list[int]) -> Ints:
        return np.array(entries, dtype=np.int64)

    nbytes = array([graph.value[name].nbytes for name in names])
    last_read = array([last_forward.get(name, graph.producer[name]) for name in names])
    last_use = array([uses[name][-1] if name in uses else -1 for name in names])
    return Lifetimes(
        names=names,
        nbytes=nbytes,
        producer=array([graph.producer[name] for name in names]),
        last_forward=last_read,
        first_use=array([uses[name][0] if name in uses else end for name in names]),
        last_use=last_use,
        base=_base(graph, nbytes, last_read, last_use),
    )


def _base(graph: Graph, nbytes: Ints, last_forward: Ints, last_use: Ints) -> Ints:
    """Live bytes of the plain step, less the droppable values that this forward no longer reads."""
    live = np.array(simulate(replace(graph, in_flight=1), keep_all(graph)).live_bytes, dtype=np.int64)
    change = np.zeros(len(graph.ops) + 1, dtype=np.int64)
    used = last_use >= 0
    np.add.at(change, last_forward[used] + 1, nbytes[used])
    np.add.at(change, last_use[used] + 1, -nbytes[used])
    base: Ints = live - np.cumsum(change[:-1])
    return base
