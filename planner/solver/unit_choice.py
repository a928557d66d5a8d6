"""Which point of its front each unit takes: a program with one binary column for each.

A step holds, besides what the outer code o holds, what units keep from their forward to their backward (s) and what the unit
that runs adds (in its forward f, in its backward t, its own s included):

    minimise    sum of calls[u] time[u, p] x[u, p]
    for each u:                 sum over p of x[u, p] = 1
    in the outer code:          o + sum over units kept of s[u, p] x[u, p]                              <= budget
    in a unit's forward:        o + sum over units kept of s[u, p] x[u, p] + sum of f[v, p] x[v, p]     <= budget
    in a unit v's backward:     o + sum over other units kept of s[u, p] x[u, p] + sum of t[v, p] x[v, p] <= budget

A unit that is called several times takes one point for all calls; the sums are over calls, then, with the column of their unit.
The o are read off a simulated step, in which they are what is left of the live bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.graph.compose import Composed
from planner.graph.outer import UnitCall
from planner.graph.simulate import simulate
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
        is_forward: of a call's, that it is its forward.
    """

    outer_bytes: int
    kept: frozenset[UnitCall]
    call: UnitCall | None = None
    is_forward: bool = False


def sections(composed: Composed, points: Mapping[str, Point]) -> tuple[Section, ...]:
    """The sections of a step with units, what the outer code holds read off a simulated step.

    Args:
        composed: outer code and units.
        points: a point for each unit; which does not matter.
    """
    schedule = composed.schedule({unit: one.schedule for unit, one in points.items()})
    live = simulate(composed.graph, schedule).live_bytes
    begins = {bounds[2 * k]: (call, k == 0) for call, bounds in composed.bounds.items() for k in range(2)}
    ends = {bounds[2 * k + 1] for bounds in composed.bounds.values() for k in range(2)}
    kept: dict[UnitCall, int] = {}
    outer: dict[tuple[frozenset[UnitCall], UnitCall | None, bool], int] = {}
    inside: tuple[UnitCall, bool] | None = None
    for step, i in enumerate(schedule.steps):
        if i in begins:
            call, is_forward = inside = begins[i]
            outer[frozenset(kept.keys() - {call}), call, is_forward] = live[step] - sum(kept.values())
            if not is_forward:
                del kept[call]
        if inside is None:
            key = frozenset(kept), None, False
            outer[key] = max(outer.get(key, 0), live[step] - sum(kept.values()))
        if i in ends and inside is not None:
            if inside[1]:
                kept[inside[0]] = points[inside[0].unit].saved_bytes
            inside = None
    return tuple(Section(nbytes, *key) for key, nbytes in outer.items())


def peak_bytes(section: Section, points: Mapping[str, Point]) -> int:
    """The most that is live in a section of the step; the largest of all sections is what `simulate` finds.

    Args:
        points: one for each unit.
    """
    own = 0
    if section.call is not None:
        one = points[section.call.unit]
        own = one.forward_bytes if section.is_forward else one.backward_bytes
    return section.outer_bytes + own + sum(points[call.unit].saved_bytes for call in section.kept)


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
    scale = max(peak_bytes(section, {unit: front[0] for unit, front in fronts.items()}) for section in sections)
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
        for column, one in zip(columns[unit], fronts[unit], strict=True):
            nbytes[column] += one.forward_bytes if section.is_forward else one.backward_bytes
    return [(column, SCALE * nbytes[column] / max(1, scale)) for column in sorted(nbytes)]


def _read(columns: Mapping[str, Sequence[int]], values: Sequence[float]) -> dict[str, int]:
    return {unit: max(range(len(own)), key=lambda k: values[own[k]]) for unit, own in columns.items()}
