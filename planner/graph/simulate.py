"""The only function that computes a schedule's peak and time: live bytes at every step, and what is freed when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, check

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What `simulate` found.

    Attributes:
        live_bytes: bytes live while each step runs (its reads, writes and workspace included).
        frees: names of the values whose current instance dies right after each step.
        boundary: number of leading steps that make up the forward.
        saved: values written by ops that are alive between forward and backward, forward outputs included.
        peak_bytes, peak_step: the largest of `live_bytes` and where it is first reached.
        time_ns: summed cost of all steps.
    """

    live_bytes: tuple[int, ...]
    frees: tuple[tuple[str, ...], ...]
    boundary: int
    saved: tuple[str, ...]
    peak_bytes: int
    peak_step: int
    time_ns: int


def simulate(graph: Graph, schedule: Schedule, simulator: Simulator | None = None) -> Timeline:
    """Simulate `schedule`.

    Every read uses the latest instance of a value; an instance dies after its last read; the first instance of an output, and
    everything resident, never dies. Gradients of outputs are live from the end of the forward. A step holds what is live, what
    it writes and its workspace, and, of n forwards in flight, what the n - 1 others saved. `simulator`: the graph's, if it was
    made before.

    Raises:
        ScheduleError: the schedule is not a valid way to run the graph.
    """
    check(graph, schedule)
    simulator = simulator or Simulator(graph)
    run = simulator.run(schedule.steps)
    boundary = schedule.boundary(graph)
    frees: list[list[str]] = [[] for _ in schedule.steps]
    for v, end in zip(run.value.tolist(), run.end.tolist(), strict=True):
        if end < len(frees):
            frees[end].append(simulator.names[v])
    across = run.value[(run.start < boundary) & (run.end >= boundary)]
    return Timeline(
        live_bytes=tuple(run.live_bytes.tolist()),
        frees=tuple(map(tuple, frees)),
        boundary=boundary,
        saved=tuple(sorted(simulator.names[v] for v in across.tolist())),
        peak_bytes=int(run.live_bytes.max(initial=0)) if schedule.steps else simulator.resident_bytes,
        peak_step=int(run.live_bytes.argmax()) if schedule.steps else 0,
        time_ns=sum(graph.ops[i].cost_ns for i in schedule.steps),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A schedule in integers. The events are sorted by value, then step; an instance is a write and the reads up to the next.

    Attributes:
        live_bytes: per step.
        event_value, event_step, event_write: per read or write of a value that ops write; inputs are left out.
        value, start, end: per instance, its value, the step that writes it, its last step (the number of steps: never dies).
    """

    live_bytes: Ints
    event_value: Ints
    event_step: Ints
    event_write: NDArray[np.bool_]
    value: Ints
    start: Ints
    end: Ints


class Simulator:
    """A graph in integers: what `simulate` and a search that tries thousands of schedules have in common.

    Values are numbered as in `graph.values`.

    Attributes:
        names, nbytes: per value.
        reads, writes, workspace: per op; resident values are left out.
        outputs: per value, whether its first instance never dies.
        resident_bytes, tangent_bytes: alive from the start, and from the end of the forward on.
        last_forward: the last op of the forward (-1: none).
        others: forwards in flight beside the one that is simulated; each of them holds what it saves.
    """

    def __init__(self, graph: Graph) -> None:
        self.names = [value.name for value in graph.values]
        self.nbytes = np.array([value.nbytes for value in graph.values], dtype=np.int64)
        number = {name: v for v, name in enumerate(self.names)}
        inputs = set(graph.inputs)
        self.reads = [tuple(number[name] for name in dict.fromkeys(op.reads) if name not in inputs) for op in graph.ops]
        self.writes = [tuple(number[name] for name in op.writes) for op in graph.ops]
        self.tangent_bytes, self.resident_bytes = graph.tangent_bytes, graph.resident_bytes
        self.workspace = np.array([op.workspace_bytes for op in graph.ops], dtype=np.int64)
        self.last_forward, self.others = graph.num_forward_ops - 1, graph.in_flight - 1
        self.outputs = np.zeros(len(self.names), dtype=bool)
        self.outputs[[number[name] for name in (*graph.forward_outputs, *graph.backward_outputs)]] = True
        # Per op, its slice of one long list: reads first, then writes.
        touched = [(*reads, *writes) for reads, writes in zip(self.reads, self.writes, strict=True)]
        self._touched = np.array([v for values in touched for v in values], dtype=np.int64)
        wrote = [k >= len(reads) for reads, values in zip(self.reads, touched, strict=True) for k in range(len(values))]
        self._wrote = np.array(wrote, dtype=bool)
        self._count = np.array([len(values) for values in touched], dtype=np.int64)
        self._begin = np.cumsum(self._count) - self._count

    def run(self, steps: Sequence[int]) -> Run:
        """Simulate a valid schedule."""
        ops = np.asarray(steps, dtype=np.int64)
        end = len(ops)
        count = self._count[ops]
        first = np.cumsum(count) - count
        at = np.arange(int(count.sum())) + np.repeat(self._begin[ops] - first, count)
        value, step, write = self._touched[at], np.repeat(np.arange(end), count), self._wrote[at]
        order = np.argsort(value * end + step)
        value, step, write = value[order], step[order], write[order]

        begins = np.flatnonzero(write)
        born, owner = step[begins], value[begins]
        dies = step[np.append(begins[1:], len(step))[: len(begins)] - 1]
        fresh = np.append(True, owner[1:] != owner[:-1])[: len(owner)]
        dies = np.where(fresh & self.outputs[owner], end, dies)
        change = np.zeros(end + 2, dtype=np.int64)
        np.add.at(change, born, self.nbytes[owner])
        np.subtract.at(change, dies + 1, self.nbytes[owner])
        ends_forward = np.flatnonzero(ops == self.last_forward)
        boundary = int(ends_forward[0]) + 1 if self.last_forward >= 0 and len(ends_forward) else 0
        change[boundary] += self.tangent_bytes
        live = np.cumsum(change[:end]) + self.resident_bytes + self.workspace[ops]
        if self.others:
            live += self.others * int(self.nbytes[owner[(born < boundary) & (dies >= boundary)]].sum())
        return Run(live, value, step, write, owner, born, dies)
