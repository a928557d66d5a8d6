"""The only judge of a schedule: live bytes at every step, what is freed when, the peak and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.graph.graph import Graph, Kind
from planner.graph.schedule import Schedule, check


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


def simulate(graph: Graph, schedule: Schedule) -> Timeline:
    """Run `schedule` on paper.

    Every read uses the latest instance of a value; an instance dies after its last read; the first
    instance of an output, and everything resident, never dies. Tangents come to life with the
    backward. A step holds what is live, what it writes and its workspace.

    Raises:
        ScheduleError: the schedule is not a valid way to run the graph.
    """
    check(graph, schedule)
    simulator = Simulator(graph)
    steps, outputs = schedule.steps, frozenset((*graph.forward_outputs, *graph.backward_outputs))
    boundary = schedule.boundary(graph)
    live_bytes, dying = simulator.run(steps)
    frees = tuple(tuple(simulator.names[v] for v in values) for values in dying)
    alive: set[str] = set()
    for i, freed in zip(steps[:boundary], frees, strict=False):
        alive.update(graph.ops[i].writes)
        alive.difference_update(name for name in freed if name not in outputs)
    peak = max(live_bytes, default=simulator.resident_bytes)
    return Timeline(
        live_bytes=tuple(live_bytes),
        frees=frees,
        boundary=boundary,
        saved=tuple(sorted(alive)),
        peak_bytes=peak,
        peak_step=live_bytes.index(peak) if live_bytes else 0,
        time_ns=sum(graph.ops[i].cost_ns for i in steps),
    )


class Simulator:
    """A graph in integers: what `simulate` and a search that tries thousands of schedules have in common.

    Values are numbered as in `graph.values`.

    Attributes:
        names, nbytes: per value.
        reads, writes: per op, values.
        resident_bytes, tangent_bytes: alive from the start, and from the turn to the backward on.
    """

    def __init__(self, graph: Graph) -> None:
        self.names = [value.name for value in graph.values]
        self.nbytes = [value.nbytes for value in graph.values]
        number = {name: v for v, name in enumerate(self.names)}
        self.reads = [tuple(dict.fromkeys(number[name] for name in op.reads)) for op in graph.ops]
        self.writes = [tuple(number[name] for name in op.writes) for op in graph.ops]
        self.tangent_bytes = sum(value.nbytes for value in graph.values if value.kind is Kind.TANGENT)
        self.resident_bytes = sum(graph.value[name].nbytes for name in graph.inputs) - self.tangent_bytes
        self._workspace = [op.workspace_bytes for op in graph.ops]
        self._last_forward = graph.num_forward_ops - 1
        self._inputs = bytearray(len(self.names))
        for name in graph.inputs:
            self._inputs[number[name]] = 1
        self._outputs = frozenset(number[name] for name in (*graph.forward_outputs, *graph.backward_outputs))

    def run(self, steps: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """Live bytes at each step of a valid schedule, and the values whose current instance dies right after it."""
        dying = self._dying(steps)
        nbytes, live = self.nbytes, self.resident_bytes
        awaited = self._last_forward  # the turn is right after its first run
        if awaited < 0:
            live += self.tangent_bytes
        live_bytes = []
        for i, values in zip(steps, dying, strict=True):
            for v in self.writes[i]:
                live += nbytes[v]
            live_bytes.append(live + self._workspace[i])
            for v in values:
                live -= nbytes[v]
            if i == awaited:
                live += self.tangent_bytes
                awaited = -1
        return live_bytes, dying

    def _dying(self, steps: Sequence[int]) -> list[list[int]]:
        dying: list[list[int]] = [[] for _ in steps]
        first = {i: t for t, i in reversed(list(enumerate(steps)))}
        read_later = bytearray(self._inputs)  # inputs never die
        last_read: dict[int, int] = {}  # of an output's instance: it dies there unless it is the first
        for t in range(len(steps) - 1, -1, -1):
            i = steps[t]
            for v in self.writes[i]:
                if v in self._outputs:
                    last = last_read.pop(v, t)
                    if first[i] != t:
                        dying[last].append(v)
                elif not read_later[v]:
                    dying[t].append(v)  # nobody reads this instance
                read_later[v] = 0
            for v in self.reads[i]:
                if not read_later[v]:
                    read_later[v] = 1
                    if v in self._outputs:
                        last_read[v] = t
                    else:
                        dying[t].append(v)
        return dying
