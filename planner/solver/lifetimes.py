"""Which forward values a plan decides about, how long they are wanted, and the bytes that no decision changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OutputCopy:
    """An output that its op makes again when it runs again: never dropped, but one more instance while it is read.

    Attributes:
        nbytes: of the second instance.
        last_use: the last backward op that reads it (-1 where none does).
        readers: forward ops that read it and may have to run again.
    """

    nbytes: int
    last_use: int
    readers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Lifetimes:
    """The droppable values d of a graph: written by the forward, no outputs, and wanted by the backward,
    directly or to recompute another. Times are op indices of the plain step.

    Attributes:
        names: the droppable values; all arrays below but `base` have one entry for each.
        nbytes: s_d.
        producer: pi(d).
        readers: forward ops that read d and may have to run again.
        last_forward: the last forward op that reads d (its producer where none does).
        first_use, last_use: the first and last backward op that reads d (len(ops) and -1 where none does).
        first_need: per forward op, the first backward op for which it may have to run again (len(ops): none).
        output_copies: per forward op, the outputs it writes that are read once it has run again.
        base: per op, bytes live while it runs that no decision changes (droppable values it reads excluded in the backward).
    """

    names: tuple[str, ...]
    nbytes: Ints
    producer: Ints
    readers: tuple[tuple[int, ...], ...]
    last_forward: Ints
    first_use: Ints
    last_use: Ints
    first_need: Ints
    output_copies: tuple[tuple[OutputCopy, ...], ...]
    base: Ints


def lifetimes(graph: Graph) -> Lifetimes:
    """Read the droppable values of a graph."""
    end, forward_end = len(graph.ops), graph.num_forward_ops
    forward_readers: dict[str, list[int]] = {}
    uses: dict[str, list[int]] = {}
    for i, op in enumerate(graph.ops):
        for name in dict.fromkeys(op.reads):
            (forward_readers if i < forward_end else uses).setdefault(name, []).append(i)

    first_need = np.full(forward_end, end, dtype=np.int64)
    need: dict[str, int] = {}
    pinned = graph.pinned
    for i in range(forward_end - 1, -1, -1):
        for name in graph.ops[i].writes:
            again = [int(first_need[j]) for j in forward_readers.get(name, ()) if graph.ops[j].recomputable]
            need[name] = end if name in pinned else min([*uses.get(name, ())[:1], *again], default=end)
        first_need[i] = min((need[name] for name in graph.ops[i].writes), default=end)

    names = tuple(name for op in graph.ops[:forward_end] for name in op.writes if need[name] < end)
    reruns = {j for j in range(forward_end) if graph.ops[j].recomputable and first_need[j] < end}
    readers = {name: tuple(j for j in forward_readers.get(name, ()) if j in reruns) for name in graph.producer}
    producer = [graph.producer[name] for name in names]
    last = {name: uses[name][-1] if name in uses else -1 for name in readers}
    last_use = [last[name] for name in names]
    output_copies = tuple(
        tuple(
            OutputCopy(graph.value[name].nbytes, last[name], readers[name])
            for name in op.writes
            if need[name] == end and (name in uses or readers[name])
        )
        for op in graph.ops[:forward_end]
    )
    nbytes = np.array([graph.value[name].nbytes for name in names], dtype=np.int64)
    last_read = [forward_readers.get(name, [i])[-1] for name, i in zip(names, producer, strict=True)]
    last_forward = np.array(last_read, dtype=np.int64)
    return Lifetimes(
        names=names,
        nbytes=nbytes,
        producer=np.array(producer, dtype=np.int64),
        readers=tuple(readers[name] for name in names),
        last_forward=last_forward,
        first_use=np.array([uses[name][0] if name in uses else end for name in names], dtype=np.int64),
        last_use=np.array(last_use, dtype=np.int64),
        first_need=first_need,
        output_copies=output_copies,
        base=_base(graph, nbytes, last_forward, np.array(last_use, dtype=np.int64)),
    )


def _base(graph: Graph, nbytes: Ints, last_forward: Ints, last_use: Ints) -> Ints:
    """Live bytes of the plain step, less the droppable values that this forward no longer reads."""
    live = np.array(simulate(graph, keep_all(graph)).live_bytes, dtype=np.int64)
    change = np.zeros(len(graph.ops) + 1, dtype=np.int64)
    used = last_use >= 0
    np.add.at(change, last_forward[used] + 1, nbytes[used])
    np.add.at(change, last_use[used] + 1, -nbytes[used])
    base: Ints = live - np.cumsum(change[:-1])
    return base
