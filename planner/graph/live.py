"""What is live at every step of a schedule, by what it is for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from planner.graph.graph import Graph, Kind
from planner.graph.modules import fold, place_of
from planner.graph.schedule import Schedule
from planner.graph.simulate import Ints, Simulator


class MemoryKind(StrEnum):
    """What live bytes are for; in the order in which they are stacked."""

    RESERVED = "reserved"
    PARAMETERS = "parameters and buffers"
    INPUTS = "inputs and outputs"
    """Arguments of the call, the forward's results, and the gradients of results that come in."""
    IN_FLIGHT = "other forwards in flight"
    """What the other forwards of a pipeline saved."""
    GRADIENTS = "gradients"
    """Those that the step returns."""
    KEPT = "kept activations"
    """Written in the forward and alive when it ends."""
    RECOMPUTED = "recomputed"
    TEMPORARY = "temporaries"
    """Everything else: what the forward drops again, gradients of activations, workspace."""


_RESIDENT = {
    Kind.RESERVED: MemoryKind.RESERVED,
    Kind.PARAM: MemoryKind.PARAMETERS,
    Kind.BUFFER: MemoryKind.PARAMETERS,
    Kind.INPUT: MemoryKind.INPUTS,
    Kind.TANGENT: MemoryKind.INPUTS,
}


@dataclass(frozen=True, slots=True)
class Span:
    """A value's bytes over the steps from `start` to `end`, both included.

    Attributes:
        name: of the value, or of the op whose workspace it is.
        op: index of the op that wrote it; -1 for what comes from outside.
        place: where that op comes from, for people; "" for what comes from outside.
    """

    name: str
    op: int
    place: str
    part: MemoryKind
    nbytes: int
    start: int
    end: int


def spans(graph: Graph, schedule: Schedule) -> Iterator[Span]:
    """Everything that is live during a step. At each step the sum is what `simulate` says is live.

    Args:
        schedule: valid for `graph`.
    """
    steps, last = schedule.steps, len(schedule.steps) - 1
    boundary, again = schedule.boundary(graph), set(schedule.recomputes())
    simulator = Simulator(graph)
    for name in graph.inputs:
        value = graph.value[name]
        yield Span(name, -1, "", _RESIDENT[value.kind], value.nbytes, boundary if value.kind is Kind.TANGENT else 0, last)
    run = simulator.run(steps)
    if graph.in_flight > 1:
        across = (run.start < boundary) & (run.end >= boundary)
        nbytes = (graph.in_flight - 1) * int(simulator.nbytes[run.value[across]].sum())
        yield Span(MemoryKind.IN_FLIGHT.value, -1, "", MemoryKind.IN_FLIGHT, nbytes, 0, last)
    forward_outputs, backward_outputs = set(graph.forward_outputs), set(graph.backward_outputs)
    for v, start, end in zip(run.value.tolist(), run.start.tolist(), run.end.tolist(), strict=True):
        name = simulator.names[v]
        if end > last and name in forward_outputs:
            part = MemoryKind.INPUTS
        elif end > last and name in backward_outputs:
            part = MemoryKind.GRADIENTS
        elif start in again:
            part = MemoryKind.RECOMPUTED
        else:
            part = MemoryKind.KEPT if start < boundary <= end else MemoryKind.TEMPORARY
        i = steps[start]
        yield Span(name, i, place_of(graph.ops[i]), part, graph.value[name].nbytes, start, min(end, last))
    for t, i in enumerate(steps):
        op = graph.ops[i]
        if op.workspace_bytes:
            yield Span(f"workspace of {op.name}", i, place_of(op), MemoryKind.TEMPORARY, op.workspace_bytes, t, t)


def live_parts(graph: Graph, schedule: Schedule) -> dict[MemoryKind, Ints]:
    """Bytes live while each step runs, by part."""
    change = {part: np.zeros(len(schedule.steps) + 1, dtype=np.int64) for part in MemoryKind}
    for span in spans(graph, schedule):
        if span.start <= span.end:
            change[span.part][span.start] += span.nbytes
            change[span.part][span.end + 1] -= span.nbytes
    return {part: np.cumsum(changes[:-1]) for part, changes in change.items()}


@dataclass(frozen=True, slots=True)
class Group:
    """Values alike but for the number of their block: `count` of `nbytes` each. `place`: their modules, as one path."""

    name: str
    place: str
    part: MemoryKind
    nbytes: int
    count: int


def largest(graph: Graph, schedule: Schedule, step: int, count: int) -> list[Group]:
    """What holds most at a step: values of equal blocks as one, the largest sum first."""
    alike: defaultdict[tuple[str, MemoryKind, int], list[str]] = defaultdict(list)
    for span in spans(graph, schedule):
        if span.start <= step <= span.end and span.nbytes:
            name = re.sub(r"_\d+$", "", span.name) if span.place else _given_name(span)
            alike[name, span.part, span.nbytes if span.place else 0].append(span.place or str(span.nbytes))
    groups = []
    for (name, part, nbytes), places in alike.items():
        if nbytes:
            groups.append(Group(name, ", ".join(fold(dict.fromkeys(places, nbytes))), part, nbytes, len(places)))
        else:  # what comes from outside is one entry, however many tensors it is
            groups.append(Group(name, "", part, sum(map(int, places)), 1))
    return sorted(groups, key=lambda group: (-group.count * group.nbytes, group.place, group.name))[:count]


def _given_name(span: Span) -> str:
    """What comes from outside is called after its kind; bytes that are set aside, after what they are for."""
    return span.name.strip("()") if span.part is MemoryKind.RESERVED else span.part.value
