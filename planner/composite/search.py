"""A point of its front for each unit: chosen by the program, evaluated by simulation and by a measured step.

What the outer code holds has two sources, and one use: the captured graph of the whole step, where that can be had, or a
measured step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planner import units
from planner.composite.kinds import UnitKind
from planner.composite.trial import Made, Trial
from planner.errors import CaptureError, NoScheduleFoundError
from planner.graph.compose import Composed, compose
from planner.graph.floor import floor, has_one_sample
from planner.graph.graph import Graph
from planner.graph.outer import OuterCodeError, OuterGraph, UnitCall, contracted, from_measured
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.unit_point import Point, point
from planner.limits import Limits, Spending
from planner.log import PLANNER
from planner.solver.unit_choice import Choice, Chosen, Section, choose, lowest, sections
from planner.solver.unit_front import front

_FRONT_SHARE = 0.2
"""Of the solver's effort, for the front of one kind: with five times as much, that of a GPT-2 block is hardly better."""
_FRONTS_SHARE = 0.5
"""Of the solver's effort, at most, for all fronts."""
_CHOICE_SHARE = 0.25
"""Of the effort that is left, for one choice."""
_TRIES = 5
"""Choices whose step is measured, at most; each aims lower by what the last one took too much."""


@dataclass(frozen=True, slots=True)
class Found:
    """The choice whose measured step fits.

    Attributes:
        points: per unit, its position in its front.
        peak_bytes: measured.
        bound_ns: no choice within the budget recomputes less.
    """

    points: Choice
    peak_bytes: int
    bound_ns: int


class UnitSearch:
    """The units of a model, their fronts, and the step around them."""

    def __init__(self, trial: Trial, kinds: Sequence[UnitKind], limits: Limits, whole: Graph | None) -> None:
        """`whole`: the captured graph of the whole step; None where it cannot be captured.

        Raises:
            NoScheduleFoundError: a step that has to be measured does not fit on the device.
        """
        self.trial, self._spending, self._whole = trial, Spending(limits), whole
        self._peaks: dict[frozenset[tuple[str, int]], int | None] = {}
        of = {name: kind for kind in kinds for name in kind.members}
        self.kinds: Mapping[str, UnitKind] = {name: of[name] for name, _ in trial.model.named_modules() if name in of}
        outer = self._contracted()
        held = self.kinds.keys() if outer is None else outer.held
        share = min(_FRONT_SHARE, _FRONTS_SHARE / len(kinds))
        fronts: dict[int, Sequence[Point]] = {}
        for kind in kinds:
            limits = self._spending.take(share / self._spending.left)
            points = front(kind.graph, limits, holds=not held.isdisjoint(kind.members))
            is_called_again = any(trial.submodules.counts[name] > 1 for name in kind.members)
            fronts[id(kind)] = _summed_as_by_eager(kind, points) if is_called_again else points
        self.fronts: Mapping[str, Sequence[Point]] = {name: fronts[id(kind)] for name, kind in self.kinds.items()}
        self.outer = outer or self._measured_outer()

    def _contracted(self) -> OuterGraph | None:
        """The outer code of the captured step; None where it cannot be told from that."""
        if self._whole is None or any(self.trial.submodules.counts[unit] != 1 for unit in self.kinds):
            return None
        try:
            outer = contracted(self._whole, self._graphs)
            compose(outer, self._graphs)
        except OuterCodeError as error:
            PLANNER.info("outer code is measured: %s", error)
            return None
        return outer

    def _measured_outer(self) -> OuterGraph:
        least = {unit: min(range(len(own)), key=lambda at: own[at].figures) for unit, own in self.fronts.items()}
        measured = self.trial.sections(self.made(least))
        if measured is None:
            raise NoScheduleFoundError(
                "a step with every unit at its lowest did not fit on the device, and could not be measured. Reduce the batch."
            )
        saved = {unit: self.fronts[unit][at].saved_bytes for unit, at in least.items()}
        try:
            calls = [UnitCall(unit, k) for unit in self.kinds for k in range(self.trial.submodules.counts[unit])]
            return from_measured(self.trial.resident_bytes, measured, saved, calls, self.trial.held_bytes)
        except OuterCodeError as error:
            raise CaptureError(
                f"{error}: its planned backward does not run as it was captured. Name other submodules as units"
            ) from error

    @cached_property
    def composed(self) -> Composed:
        """Outer code and units as one graph."""
        return compose(self.outer, self._graphs)

    @property
    def _graphs(self) -> Mapping[str, Graph]:
        return {unit: kind.graph for unit, kind in self.kinds.items()}

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """What the outer code holds in each section of the step, what a unit adds, and whose saved bytes are alive in it."""
        return sections(self.composed, self.fronts)

    def made(self, choice: Choice, *, is_compiled: bool = False) -> dict[str, Made]:
        """What the planned modules of a choice are made of; one code for all units of a kind at one point.

        Raises:
            CompileError: inductor cannot compile it.
        """
        schedules = {unit: self.fronts[unit][at].schedule for unit, at in choice.items()}
        return {unit: self.kinds[unit].made(schedule, is_compiled=is_compiled) for unit, schedule in schedules.items()}

    def predicted_bytes(self, choice: Choice) -> int:
        """The peak of a choice, simulated."""
        schedules = {unit: self.fronts[unit][at].schedule for unit, at in choice.items()}
        return simulate(self.composed.graph, self.composed.schedule(schedules)).peak_bytes

    def chosen(self, budget_bytes: int) -> Chosen | None:
        """The choice with the least recompute that is found whose simulated peak is within a budget; None where none is.

        Its bound is that of the budget, even where only a choice for less is within it.
        """
        aim, bound_ns = budget_bytes, None
        while aim > 0:
            limits = self._spending.take(_CHOICE_SHARE)
            found = choose(self.sections, self.fronts, aim, self.composed.graph.plain_ns, limits)
            if found is None:
                return None
            self._spending.give_back(limits, found.work)
            bound_ns = found.bound_ns if bound_ns is None else bound_ns
            excess = self.predicted_bytes(found.points) - budget_bytes
            if excess <= 0:
                return replace(found, bound_ns=bound_ns)
            aim -= excess
        return None

    @cached_property
    def lowest(self) -> Choice:
        """The choice with the lowest peak."""
        return lowest(self.sections, self.fronts, self._spending.take(_CHOICE_SHARE))

    def within(self, budget_bytes: int) -> Found:
        """The choice with the least recompute that is found whose measured step is within a budget.

        Raises:
            NoScheduleFoundError: not even the lowest one's is.
        """
        aim, bound_ns = budget_bytes, None
        tried: list[Choice] = []
        for _ in range(_TRIES):
            found = self.chosen(aim)
            if found is None or found.points in tried:
                break
            tried.append(found.points)
            bound_ns = found.bound_ns if bound_ns is None else bound_ns
            peak = self._measured(found.points)
            if peak is not None and peak <= budget_bytes:
                return Found(found.points, peak, bound_ns)
            predicted = self.predicted_bytes(found.points)
            PLANNER.info("planned for %s, measured %s: choose again", *_texts(predicted, peak))
            aim = (
                predicted - (peak - budget_bytes) if peak is not None else (predicted + self.predicted_bytes(self.lowest)) // 2
            )
        peak = self._measured(self.lowest)
        if peak is None or peak > budget_bytes:
            raise _not_found(budget_bytes, peak, self._whole)
        return Found(self.lowest, peak, bound_ns or 0)

    def _measured(self, choice: Choice) -> int | None:
        """The measured peak of a choice; None: out of memory. Each choice is run once."""
        key = frozenset(choice.items())
        if key not in self._peaks:
            self._peaks[key] = self.trial.peak(self.made(choice), varies=self.outer.is_measured)
        return self._peaks[key]


def _summed_as_by_eager(kind: UnitKind, points: Sequence[Point]) -> Sequence[Point]:
    """The points whose backward hands on each term of a gradient, as eager's does: other calls add theirs.

    Others have no memory for the terms; see `planner.rewriter.sums`.
    """
    plain = kind.made(keep_all(kind.graph))[2]
    if plain is None or not plain.separated:
        return points
    made = [(one, kind.made(one.schedule)[2]) for one in points]
    kept = [one for one, code in made if code is not None and not code.summed - code.separated]
    return kept or [point(kind.graph, keep_all(kind.graph))]


def _texts(*sizes: int | None) -> list[str]:
    return ["out of memory" if size is None else units.format_bytes(size) for size in sizes]


def _not_found(budget_bytes: int, lowest_bytes: int | None, whole: Graph | None) -> NoScheduleFoundError:
    """The error. `whole`: the captured graph of the whole step, of which a schedule recomputes what units hand on, too."""
    if lowest_bytes is None:
        found, cure = "did not fit on the device", "Reduce the batch"
    else:
        found = f"peaks at {units.format_bytes(lowest_bytes)} ({lowest_bytes} bytes)"
        cure = f"Raise it to {units.enough_text(lowest_bytes)} ({lowest_bytes} bytes)"
        cure += ", or reduce the batch" if whole is None or not has_one_sample(whole) else ""
    may_fit = whole is not None and floor(whole)[0] <= budget_bytes
    cure += ". Or plan the whole model by planner.plan, which recomputes what submodules hand on, too." if may_fit else "."
    return NoScheduleFoundError(
        f"with every submodule at the lowest peak that was found for it, a measured step {found}; the budget is "
        f"{units.format_bytes(budget_bytes)}. {cure}",
        lowest_bytes=lowest_bytes,
    )
