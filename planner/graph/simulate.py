"""The only judge of a schedule: live bytes at every step, what is freed when, the peak and the time."""

from __future__ import annotations

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
    steps, ops, nbytes = schedule.steps, graph.ops, {value.name: value.nbytes for value in graph.values}
    boundary = schedule.boundary(graph)
    outputs = frozenset((*graph.forward_outputs, *graph.backward_outputs))
    tangents = sum(value.nbytes for value in graph.values if value.kind is Kind.TANGENT)
    live = sum(nbytes[name] for name in graph.inputs) - tangents
    last_reads = _last_reads(graph, steps)

    alive: set[str] = set()
    runs = [0] * len(ops)
    live_bytes: list[int] = []
    frees: list[tuple[str, ...]] = []
    saved: tuple[str, ...] = ()
    for t, i in enumerate(steps):
        if t == boundary:
            saved = tuple(sorted(alive))
            live += tangents
        runs[i] += 1
        live += sum(nbytes[name] for name in ops[i].writes)
        alive.update(ops[i].writes)
        live_bytes.append(live + ops[i].workspace_bytes)
        dying = tuple(name for name in last_reads[t] if name not in outputs or runs[graph.producer[name]] > 1)
        live -= sum(nbytes[name] for name in dying)
        alive.difference_update(name for name in dying if name not in outputs)
        frees.append(dying)
    if boundary == len(steps):
        saved = tuple(sorted(alive))
    peak = max(live_bytes, default=live)
    return Timeline(
        live_bytes=tuple(live_bytes),
        frees=tuple(frees),
        boundary=boundary,
        saved=saved,
        peak_bytes=peak,
        peak_step=live_bytes.index(peak) if live_bytes else 0,
        time_ns=sum(ops[i].cost_ns for i in steps),
    )


def _last_reads(graph: Graph, steps: tuple[int, ...]) -> list[list[str]]:
    """Per step, the values whose current instance is touched there for the last time."""
    last: list[list[str]] = [[] for _ in steps]
    read_later: set[str] = set(graph.inputs)  # inputs never die
    for t in range(len(steps) - 1, -1, -1):
        op = graph.ops[steps[t]]
        for name in op.writes:
            if name not in read_later:
                last[t].append(name)  # nobody reads this instance
            read_later.discard(name)
        for name in op.reads:
            if name not in read_later:
                last[t].append(name)
                read_later.add(name)
    return last
