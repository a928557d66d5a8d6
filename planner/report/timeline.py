"""What is live at every step of a plan, by what it is for: as numbers and as a picture, plain above planned."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from planner.graph.graph import Graph, Kind
from planner.graph.modules import fold, place_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Ints, Simulator
from planner.report import picture
from planner.units import format_bytes, format_ns


class MemoryKind(StrEnum):
    """What live bytes are for; in the order in which they are stacked."""

    RESERVED = "reserved"
    PARAMETERS = "parameters and buffers"
    INPUTS = "inputs and outputs"
    """Arguments of the call, the forward's results, and the gradients of results that come in."""
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
_COLORS = {
    MemoryKind.RESERVED: "#999999",
    MemoryKind.PARAMETERS: "#4d4d4d",
    MemoryKind.INPUTS: "#f0e442",
    MemoryKind.GRADIENTS: "#cc79a7",
    MemoryKind.KEPT: "#0072b2",
    MemoryKind.RECOMPUTED: "#d55e00",
    MemoryKind.TEMPORARY: "#a6cee3",
}
_TOP, _WIDE = 7, 44
"""Number of groups of tensors that are named at the peak, and characters for each."""


@dataclass(frozen=True, slots=True)
class Span:
    """A value's bytes over the steps from `start` to `end`, both included.

    Attributes:
        name: of the value, or of the op whose workspace it is.
        place: the module whose op wrote it, or file:line; "" for what comes from outside.
    """

    name: str
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
        yield Span(name, "", _RESIDENT[value.kind], value.nbytes, boundary if value.kind is Kind.TANGENT else 0, last)
    run = simulator.run(steps)
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
        yield Span(name, place_of(graph.ops[steps[start]]), part, graph.value[name].nbytes, start, min(end, last))
    for t, i in enumerate(steps):
        op = graph.ops[i]
        if op.workspace_bytes:
            yield Span(f"workspace of {op.name}", place_of(op), MemoryKind.TEMPORARY, op.workspace_bytes, t, t)


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


def largest(graph: Graph, schedule: Schedule, step: int, count: int = _TOP) -> list[Group]:
    """What holds most at a step: values of equal blocks as one, the largest sum first."""
    alike: defaultdict[tuple[str, MemoryKind, int], list[str]] = defaultdict(list)
    for span in spans(graph, schedule):
        if span.start <= step <= span.end and span.nbytes:
            name = re.sub(r"_\d+$", "", span.name) if span.place else span.part.value
            alike[name, span.part, span.nbytes if span.place else 0].append(span.place or str(span.nbytes))
    groups = []
    for (name, part, nbytes), places in alike.items():
        if nbytes:
            groups.append(Group(name, ", ".join(fold(dict.fromkeys(places, nbytes))), part, nbytes, len(places)))
        else:  # what comes from outside is one entry, however many tensors it is
            groups.append(Group(name, "", part, sum(map(int, places)), 1))
    return sorted(groups, key=lambda group: (-group.count * group.nbytes, group.place, group.name))[:count]


def plot(plan: PlannedGraph, path: str | Path) -> None:
    """Draw live bytes over the time of the step, plain above planned, into a .png or .svg file.

    Raises:
        PlotMissingError: matplotlib (the extra `plot`) is not installed.
        InputError: another suffix, or the file cannot be written.
    """
    picture.check(path)
    with picture.style():
        drawn = picture.figure(9.2, 6.4)
        upper, lower = drawn.subplots(2, sharex=True, sharey=True)
        unit, size = picture.bytes_unit(plan.plain.peak_bytes)
        clock, tick = picture.time_unit(plan.timeline.time_ns)
        panels = (("plain", keep_all(plan.graph), upper), ("planned", plan.solution.schedule, lower))
        for name, schedule, axes in panels:
            _panel(plan, name, schedule, axes, size, tick)
            axes.set_ylabel(f"live [{unit}]")
        lower.axhline(plan.budget_bytes / size, color="#000000", linestyle="--", linewidth=0.9, label="budget")
        lower.set_xlabel(f"time of the step [{clock}]")
        handles, labels = lower.get_legend_handles_labels()
        drawn.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, frameon=False)
        picture.save(drawn, path)


def _panel(plan: PlannedGraph, name: str, schedule: Schedule, axes: Any, size: float, tick: float) -> None:
    graph = plan.graph
    timeline = plan.plain if name == "plain" else plan.timeline
    times = np.array([0, *accumulate(graph.ops[i].cost_ns for i in schedule.steps)]) / tick
    base = np.zeros(len(times))
    for part, nbytes in live_parts(graph, schedule).items():
        top = base + np.append(nbytes, nbytes[-1:]) / size
        if nbytes.any():
            axes.fill_between(times, base, top, step="post", color=_COLORS[part], linewidth=0, label=part.value)
        base = top
    middle = (times[timeline.peak_step] + times[timeline.peak_step + 1]) / 2
    op = graph.ops[schedule.steps[timeline.peak_step]]
    axes.plot(middle, timeline.peak_bytes / size, "v", color="#000000", markersize=6, clip_on=False)
    axes.axvline(times[timeline.boundary], color="#000000", linestyle=":", linewidth=1.0)
    axes.annotate(
        "forward | backward",
        (times[timeline.boundary], 1.0),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        fontsize=7.5,
    )
    title = f"{name}: peak {format_bytes(timeline.peak_bytes)} in {op.name} ({place_of(op)}), {format_ns(timeline.time_ns)}"
    axes.set_title(title, loc="left", pad=14)
    groups = largest(graph, schedule, timeline.peak_step)
    named = [line for group in groups for line in _lines(group)]
    axes.text(
        1.01,
        1.0,
        "\n".join(["largest at the peak", *named]),
        transform=axes.transAxes,
        va="top",
        fontsize=7.0,
        family="DejaVu Sans Mono",
    )


def _lines(group: Group) -> list[str]:
    """Two lines on the largest tensors: how much and what for, then where from."""
    times = f" = {group.count} x {format_bytes(group.nbytes)}" if group.count > 1 else ""
    first = f"{format_bytes(group.count * group.nbytes)}{times}: {group.part.value}"
    where = f"{group.name}, {group.place}" if group.place else ""
    return [first, *([f"  {where if len(where) <= _WIDE else where[: _WIDE - 3] + '...'}"] if where else [])]
