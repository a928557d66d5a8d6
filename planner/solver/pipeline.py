"""The order of the stages, and the one loop that gives them their turns.

A turn gives every stage a slice of work, twice as much as in the turn before: a stage that needs little is done early, one that
needs much gets it once the others had their chance. A search stops at its gap, at its work, or when what is left of the gap is
not worth what was spent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from planner.solver import stages
from planner.solver.problem import Problem
from planner.solver.search import Search
from planner.solver.tuning import FIRST_SLICE, PATIENCE, TINY_OPS
from planner.solver.work import Work

_log = logging.getLogger("planner.solver")


def _always(problem: Problem, search: Search) -> bool:
    return True


def _is_tiny(problem: Problem, search: Search) -> bool:
    return len(problem.graph.ops) <= TINY_OPS


def _found(problem: Problem, search: Search) -> bool:
    return search.best is not None


def _not_found(problem: Problem, search: Search) -> bool:
    return search.best is None


@dataclass(frozen=True, slots=True)
class Stage:
    """A strategy and when it has its turn.

    Attributes:
        name: for the log.
        run: the strategy.
        why: what it is there for.
        min_gap: it waits while the gap, as a fraction of the plain step's time, is smaller.
        applies: it waits where this is false.
    """

    name: str
    run: stages.Strategy
    why: str
    min_gap: float = 0.0
    applies: Callable[[Problem, Search], bool] = _always


PIPELINE = (
    Stage("exhaustive", stages.exhaustive, "a few ops: certain, and at once", applies=_is_tiny),
    Stage("certificate", stages.certificate, "bounds, and what they keep is most often nearly optimal"),
    Stage("keep set", stages.keep_set, "the optimum of each value recomputed at most once"),
    Stage("segments", stages.segments, "long chains, and budgets that take more than one recompute", min_gap=0.005),
    Stage("baselines", stages.baselines, "what people do today is never better than the plan", min_gap=0.005),
    Stage("lowest peak", stages.lowest_peak, "budgets near the lowest peak there is", applies=_not_found),
    Stage("local search", stages.local_search, "what kept sets cannot say", applies=_found),
    Stage("neighbourhood", stages.neighbourhood, "the same, in integers", applies=_found),
)


@dataclass(slots=True)
class Run:
    """One budget's search under way.

    Attributes:
        gap: how far from the optimum to stop.
        spent: units of work so far.
    """

    problem: Problem
    search: Search
    gap: float
    spent: float = 0.0
    _slice: float = FIRST_SLICE
    _started: dict[str, tuple[Iterator[None], Work]] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    @property
    def is_done(self) -> bool:
        """The plan is good enough, or nothing is left to try."""
        gap = self.search.gap
        return gap <= self.gap or self.spent >= PATIENCE * (100 * gap) ** 2 or len(self._ended) == len(PIPELINE)

    def turn(self, work: Work) -> None:
        """Give every stage a slice."""
        waiting = 0
        for stage in PIPELINE:
            if self.is_done or work.is_over:
                return
            if stage.name in self._ended:
                continue
            if self.search.gap < stage.min_gap or not stage.applies(self.problem, self.search):
                waiting += 1
                continue
            self._go_on(stage, work)
        self._slice *= 2
        if waiting + len(self._ended) == len(PIPELINE):
            self._ended.update(stage.name for stage in PIPELINE)

    def _go_on(self, stage: Stage, work: Work) -> None:
        before, spent = self.search.state, work.meter.spent
        share = work.share(self._slice)
        if stage.name not in self._started:
            own = Work(meter=work.meter)
            self._started[stage.name] = stage.run(self.problem, self.search, own), own
        generator, own = self._started[stage.name]
        own.until = share.until
        while not share.is_over and self.search.gap > self.gap:
            try:
                next(generator)
            except StopIteration:
                self._ended.add(stage.name)
                break
        self.spent += work.meter.spent - spent
        _log.debug(
            "%s, budget %d: %.3f units of work; time and bound %s -> %s",
            stage.name, self.problem.budget_bytes, work.meter.spent - spent, before, self.search.state,
        )  # fmt: skip


def run(runs: Sequence[Run], work: Work) -> None:
    """Give the searches their turns, the widest gap first, until all are done or the work is over."""
    while not work.is_over:
        waiting = sorted((run for run in runs if not run.is_done), key=lambda run: -run.search.gap)
        if not waiting:
            return
        for each in waiting:
            each.turn(work)
