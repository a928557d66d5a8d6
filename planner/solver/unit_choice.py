"""Which point of its front each unit takes: a program with one binary column for each.

A step holds, besides what the outer code o holds, what units keep from their forward to their backward (s) and what the unit
that runs adds (in its forward f, in its backward t, its own s included, less what it frees of what it was given):

    minimise    sum of calls[u] time[u, p] x[u, p]
    for each u:                 sum over p of x[u, p] = 1
    in the outer code:          o + sum over units kept of s[u, p] x[u, p]                              <= budget
    in a unit's forward:        o + sum over units kept of s[u, p] x[u, p] + sum of f[v, p] x[v, p]     <= budget
    in a unit v's backward:     o + sum over other units kept of s[u, p] x[u, p] + sum of t[v, p] x[v, p] <= budget

A unit that is called several times takes one point for all calls; the sums are over calls, then, with the column of their unit.
The o, f and t are read off simulated steps, one for each point; what a unit frees depends on what the outer code around it
still needs. In each of them the o are what is left of the live bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.graph.compose import Composed
from planner.graph.outer import UnitCall
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator, simulate
from planner.graph.unit_point import Point
from planner.limits import Limits
from planner.solver.backend import SCALE, Model, Program
from planner.solver.tuning import GAP
from planner.solver.work import begin

Fronts = Mapping[str, Sequence[Point]]
"""The front of each unit, by name."""
Choice = Mapping[str, int]
"""The position in its front that each unit takes."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the step in which the same units' saved bytes are alive.

    Attributes:
        outer_bytes: the most that the outer code holds in it, everything resident included.
        kept: calls of units whose forward has run and whose backward has not begun.
        call: whose forward or backward it is; None for outer code.
        own_bytes: for each point of the call's unit, the most that it adds.
    """

    outer_bytes: int
    kept: frozenset[UnitCall]
    call: UnitCall | None = None
    own_bytes: tuple[int, ...] = ()


def sections(composed: Composed, fronts: Fronts) -> tuple[Section, ...]:
    """The sections of a step with units, read off a simulated step for each point."""
    simulator = Simulator(composed.graph)
    outer: dict[_Key, int] = {}
    own: dict[_Key, list[int]] = defaultdict(list)
    for at in range(max(map(len, fronts.values()), default=0)):
        points = {unit: front[min(at, len(front) - 1)] for unit, front in fronts.items()}
        schedule = composed.schedule({unit: one.schedule for unit, one in points.items()})
        found = _walk(composed, schedule, simulate(composed.graph, schedule, simulator).live_bytes, points)
        for key, (outer_bytes, most) in found.items():
            outer[key] = outer_bytes
            call = key[1]
            if call is not None and at < len(fronts[call.unit]):
                own[key].append(most)
    return tuple(Section(nbytes, key[0], key[1], tuple(own[key])) for key, nbytes in outer.items())


_Key = tuple[frozenset[UnitCall], UnitCall | None, bool]
"""Calls whose saved bytes are alive, whose section it is, and whether it is its forward."""


def _walk(
    composed: Composed, schedule: Schedule, live: Sequence[int], points: Mapping[str, Point]
) -> dict[_Key, tuple[int, int]]:
    """Per section of a simulated step, what the outer code holds in it and the most that the unit adds."""
    at = {i: step for step, i in enumerate(schedule.steps)}  # ops that enter and leave run once
    inside = [
        (at[bounds[2 * k]], at[bounds[2 * k + 1]] + 1, call, k == 0)
        for call, bounds in composed.bounds.items()
        for k in range(2)
    ]
    kept: dict[UnitCall, int] = {}
    found: dict[_Key, tuple[int, int]] = {}

    def outer_code(start: int, end: int) -> None:
        key = frozenset(kept), None, False
        if start < end:
            found[key] = max(max(live[start:end]) - sum(kept.values()), found.get(key, (0, 0))[0]), 0

    last = 0
    for start, end, call, is_forward in sorted(inside):
        outer_code(last, start)
        outer_bytes = live[start] - sum(kept.values())
        kept.pop(call, None)
        own_bytes = max(live[start:end]) - outer_bytes - sum(kept.values())
        found[frozenset(kept), call, is_forward] = outer_bytes, own_bytes
        if is_forward:
            kept[call] = points[call.unit].saved_bytes
        last = end
    outer_code(last, len(live))
    return found


def peak_bytes(section: Section, fronts: Fronts, choice: Choice) -> int:
    """The most that is live in a section of the step; the largest of all sections is what `simulate` finds."""
    own = 0 if section.call is None else section.own_bytes[choice[section.call.unit]]
    kept = sum(fronts[call.unit][choice[call.unit]].saved_bytes for call in section.kept)
    return section.outer_bytes + own + kept


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice, and the time that no choice of these points within the budget goes below.

    Attributes:
        points: per unit, its position in its front.
        bound_ns: of recompute.
        work: that the choice took.
    """

    points: Choice
    bound_ns: int
    work: float


def choose(
    sections: Sequence[Section], fronts: Fronts, budget_bytes: int, plain_ns: int, limits: Limits | None = None
) -> Chosen | None:
    """The choice with the least recompute within a budget; None where none is found.

    Args:
        sections: from `sections`.
        fronts: per unit.
        budget_bytes: bound on the bytes live in each section.
        plain_ns: the plain step's time, which says how exact the choice has to be.
    """
    program, columns = _program(fronts)
    calls = Counter(call.unit for call in {section.call for section in sections} if call is not None)
    largest = max((one.time_ns for front in fronts.values() for one in front), default=0)
    unit_ns = max(1, largest * max(1, calls.total())) / SCALE
    for unit, front in fronts.items():
        for column, one in zip(columns[unit], front, strict=True):
            program.costs[column] = calls[unit] * one.time_ns / unit_ns
    for section in sections:
        # sum over units kept of s[u, p] x[u, p] + sum of f or t[v, p] x[v, p] of the one that runs <= budget - o
        limit = SCALE * (budget_bytes - section.outer_bytes) / max(1, budget_bytes)
        program.row(_row(section, fronts, columns, budget_bytes), limit)
    work = begin(limits or Limits())
    answer = Model(program).relax_and_fix(work, gap=GAP / 2 * plain_ns / unit_ns)
    if not answer.values:
        return None
    made = _read(columns, answer.values)
    spent = sum(calls[unit] * fronts[unit][at].time_ns for unit, at in made.items())
    bound = 0 if math.isinf(answer.bound) else math.floor(max(0.0, answer.bound) * unit_ns)
    return Chosen(made, min(spent, bound), work.meter.spent)


def lowest(sections: Sequence[Section], fronts: Fronts, limits: Limits | None = None) -> Choice:
    """The choice with the lowest peak."""
    program, columns = _program(fronts)
    scale = max(peak_bytes(section, fronts, dict.fromkeys(fronts, 0)) for section in sections)
    peak = program.column(1.0, upper=SCALE)
    for section in sections:
        # the same sums - peak <= -o, where the peak is minimised
        row = [*_row(section, fronts, columns, scale), (peak, -1.0)]
        program.row(row, -SCALE * section.outer_bytes / max(1, scale))
    answer = Model(program).relax_and_fix(begin(limits or Limits()), gap=SCALE / 10_000)
    if answer.values:
        return _read(columns, answer.values)
    return {unit: min(range(len(front)), key=lambda at: front[at].figures) for unit, front in fronts.items()}


def _program(fronts: Fronts) -> tuple[Program, dict[str, list[int]]]:
    """Binary columns of which each unit takes one."""
    program = Program()
    columns = {unit: [program.column(binary=True) for _ in front] for unit, front in fronts.items()}
    for own in columns.values():  # sum over p of x[u, p] = 1, as <= and >=
        program.row([(column, 1.0) for column in own], 1.0)
        program.row([(column, -1.0) for column in own], -1.0)
    return program, columns


def _row(section: Section, fronts: Fronts, columns: Mapping[str, Sequence[int]], scale: int) -> list[tuple[int, float]]:
    """Bytes of the units in a section of the step, SCALE for `scale` bytes."""
    nbytes: dict[int, int] = defaultdict(int)
    for call in section.kept:
        for column, one in zip(columns[call.unit], fronts[call.unit], strict=True):
            nbytes[column] += one.saved_bytes
    if section.call is not None:
        unit = section.call.unit
        for column, own_bytes in zip(columns[unit], section.own_bytes, strict=True):
            nbytes[column] += own_bytes
    return [(column, SCALE * nbytes[column] / max(1, scale)) for column in sorted(nbytes)]


def _read(columns: Mapping[str, Sequence[int]], values: Sequence[float]) -> dict[str, int]:
    return {unit: max(range(len(own)), key=lambda k: values[own[k]]) for unit, own in columns.items()}
