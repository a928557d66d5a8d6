"""Live memory of a schedule as a series of bounded length: the steps that are drawn, and what is live at each of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from planner.graph.graph import Graph
from planner.graph.live import Span, spans
from planner.graph.modules import module_of
from planner.graph.schedule import Schedule
from planner.graph.simulate import Ints, Timeline, simulate
from planner.report.stack import Stack

OUTSIDE = ""
"""The module of what no op of the step wrote."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that are live over the drawn steps from `first` to `last`, both included (positions in `Series.steps`).

    Attributes:
        layer: of the stack.
        module: path of the module whose ops wrote them.
        nbytes: of all together.
        count: how many storages: those with equal fields above are one entry.
        name, op: of the largest of them, and the op that wrote it (-1: comes from outside).
    """

    layer: int
    module: str
    first: int
    last: int
    nbytes: int
    count: int
    name: str
    op: int


@dataclass(frozen=True, slots=True)
class Series:
    """A schedule as it is drawn.

    Attributes:
        timeline: what `simulate` says of the whole schedule.
        steps: positions in the schedule that are drawn; among them the peak, the first backward step, the first and the last.
        start_ns: when each of them starts.
        held: what is live; at each drawn step the bytes sum up to `timeline.live_bytes` there.
    """

    timeline: Timeline
    schedule: Schedule
    steps: tuple[int, ...]
    start_ns: tuple[int, ...]
    held: tuple[Held, ...]


def series(graph: Graph, schedule: Schedule, stack: Stack, most: int) -> Series:
    """A schedule in at most `most` steps (a few more where `most` is tiny)."""
    timeline = simulate(graph, schedule)
    costs = np.array([graph.ops[i].cost_ns for i in schedule.steps], dtype=np.int64)
    start_ns = np.cumsum(costs) - costs
    always = {0, timeline.boundary, timeline.peak_step, len(schedule.steps) - 1}
    live = np.array(timeline.live_bytes, dtype=np.int64)
    steps = drawn_steps(live, start_ns, [t for t in always if 0 <= t < len(schedule.steps)], most)
    held = _held(graph, schedule, stack, steps)
    return Series(timeline, schedule, tuple(steps.tolist()), tuple(start_ns[steps].tolist()), held)


def drawn_steps(live: Ints, start_ns: Ints, always: Iterable[int], most: int) -> Ints:
    """The steps to draw, in order: all where they are few; else, of equal stretches of time, the highest and the lowest one.

    Args:
        live: bytes per step.
        start_ns: when each step starts; does not fall.
        always: steps that are drawn in any case.
        most: number of steps that are drawn, if `always` leaves room.
    """
    if len(live) <= most:
        return np.arange(len(live))
    kept = set(always)
    stretches = max(1, (most - len(kept)) // 2)
    edges = np.linspace(start_ns[0], start_ns[-1], stretches + 1)[1:-1]
    for stretch in np.split(np.arange(len(live)), np.searchsorted(start_ns, edges)):
        if len(stretch):
            kept.update((int(stretch[live[stretch].argmax()]), int(stretch[live[stretch].argmin()])))
    return np.array(sorted(kept), dtype=np.int64)


def _held(graph: Graph, schedule: Schedule, stack: Stack, steps: Ints) -> tuple[Held, ...]:
    """What is live at the drawn steps. What lives only between two of them is left out."""
    modules = [module_of(op) for op in graph.ops]
    alike: defaultdict[tuple[int, int, int, str], list[Span]] = defaultdict(list)
    for span in spans(graph, schedule):
        first, last = (int(at) for at in np.searchsorted(steps, (span.start, span.end + 1)))
        if span.nbytes and first < last:
            module = modules[span.op] if span.op >= 0 else OUTSIDE
            alike[first, last - 1, stack.layer_of(span), module].append(span)
    held = []
    for (first, last, layer, module), found in sorted(alike.items()):
        largest = max(found, key=lambda span: (span.nbytes, span.name))
        nbytes = sum(span.nbytes for span in found)
        held.append(Held(layer, module, first, last, nbytes, len(found), largest.name, largest.op))
    return tuple(held)
