"""What is live at every step of a schedule, by what it is for: tables, pictures and estimates add up the same spans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from planner.graph.accumulation import HELD
from planner.graph.graph import Graph, Kind, freed_early
from planner.graph.modules import place_of
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
    """Those that the step returns, and those of earlier micro-steps."""
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

    Without ops, what is resident is live at step 0.

    Args:
        schedule: valid for `graph`.
    """
    steps, last = schedule.steps, max(0, len(schedule.steps) - 1)
    boundary, again = schedule.boundary(graph), set(schedule.recomputes())
    simulator = Simulator(graph)
    for name in graph.inputs:
        value = graph.value[name]
        part = MemoryKind.GRADIENTS if name == HELD else _RESIDENT[value.kind]
        yield Span(name, -1, "", part, value.nbytes, boundary if value.kind is Kind.TANGENT else 0, last)
    run = simulator.run(steps)
    if graph.in_flight > 1:
        across = (run.start < boundary) & (run.end >= boundary)
        nbytes = (graph.in_flight - 1) * int(simulator.nbytes[run.value[across]].sum())
        yield Span(MemoryKind.IN_FLIGHT.value, -1, "", MemoryKind.IN_FLIGHT, nbytes, 0, last)
    forward_outputs, backward_outputs = set(graph.forward_outputs), set(graph.backward_outputs)
    early = {(name, i): nbytes for i, op in enumerate(graph.ops) for name, nbytes in freed_early(graph, op).items()}
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
        span = Span(name, i, place_of(graph.ops[i]), part, graph.value[name].nbytes, start, min(end, last))
        freed = early.get((name, steps[span.end]), 0)
        if freed:
            yield replace(span, nbytes=span.nbytes - freed, start=span.end)
            span = replace(span, end=span.end - 1)
        yield span
    for t, i in enumerate(steps):
        op = graph.ops[i]
        if op.workspace_bytes > 0:
            yield Span(f"workspace of {op.name}", i, place_of(op), MemoryKind.TEMPORARY, op.workspace_bytes, t, t)


def live_parts(graph: Graph, schedule: Schedule) -> dict[MemoryKind, Ints]:
    """Bytes live while each step runs, by part."""
    change = {part: np.zeros(max(1, len(schedule.steps)) + 1, dtype=np.int64) for part in MemoryKind}
    for span in spans(graph, schedule):
        if span.start <= span.end:
            change[span.part][span.start] += span.nbytes
            change[span.part][span.end + 1] -= span.nbytes
    return {part: np.cumsum(changes[:-1])[: len(schedule.steps)] for part, changes in change.items()}
