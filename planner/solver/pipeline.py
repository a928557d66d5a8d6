"""The order of the stages, and the one loop that gives them their turns.

A turn gives every stage a slice of work, twice as much as in the turn before: a stage that needs little is done early, one that
needs much gets it once the others had their chance. A search stops at its gap, at its work, or when what is left of the gap is
not worth what was spent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from planner.log import SOLVER
from planner.solver import stages
from planner.solver.problem import Problem
from planner.solver.search import Search
from planner.solver.tuning import EVENT_UNITS, FIRST_SLICE, GAP, PATIENCE
from planner.solver.work import Work


def _always(problem: Problem, search: Search) -> bool:
    return True


def _is_tiny(problem: Problem, search: Search) -> bool:
    return len(problem.graph.ops) <= 10


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
        first_turn: it waits for so many turns of the others, whose slices have doubled as often by then.
        applies: it waits where this is false.
    """

    name: str
    run: stages.Strategy
    why: str
    min_gap: float = 0.0
    first_turn: int = 0
    applies: Callable[[Problem, Search], bool] = _always


PIPELINE = (
    Stage("exhaustive", stages.exhaustive, "a few ops: certain, and at once", applies=_is_tiny),
    Stage("certificate", stages.certificate, "bounds, and what they keep is most often nearly optimal"),
    Stage("keep set", stages.keep_set, "the optimum of each value recomputed at most once"),
    Stage("segments", stages.segments, "long chains, and budgets that take more than one recompute", 5 * GAP, 1),
    Stage("baselines", stages.baselines, "what people do today is never better than the plan", 5 * GAP, 1),
    Stage("descent", stages.descent, "from the lowest schedule down to the budget", 0.0, 1, _not_found),
    Stage("lowest peak", stages.lowest_peak, "budgets near the lowest peak there is", 0.0, 1, _not_found),
    Stage("local search", stages.local_search, "what kept sets cannot say", 0.0, 2, _found),
)


@dataclass(slots=True)
class _Turns:
    """A stage under way: its generator, what it may spend, its next slice, and the state after which it got nowhere."""

    generator: Iterator[stages.Progress]
    work: Work
    slice: float = FIRST_SLICE
    empty: int = 0
    stuck_at: tuple[int, int] | None = None


class Run:
    """One budget's search under way.

    Attributes:
        problem, search: what is looked for, and what was found.
        spent: units of work so far.
    """

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.spent = 0.0
        self._turns: dict[str, _Turns] = {}
        self._ended: set[str] = set()
        self._num_turns = 0
        self._has_more = True

    @property
    def is_done(self) -> bool:
        """The plan is good enough, nothing can fit, or nothing is left to try."""
        gap = self.search.gap
        is_enough = gap <= 5 * GAP and self.spent >= PATIENCE * (100 * gap) ** 2
        return self._is_good or is_enough or not self._has_more

    @property
    def _is_good(self) -> bool:
        return self.search.is_hopeless or (self.search.best is not None and self.search.gap <= self.problem.gap)

    def turn(self, work: Work) -> None:
        """Give every stage a slice."""
        self._has_more = self._num_turns < max(stage.first_turn for stage in PIPELINE)
        for stage in PIPELINE:
            if self._waits(stage):
                continue
            self._has_more = True
            if self.is_done or work.is_over:
                return
            self._go_on(stage, work)
        self._num_turns += 1

    def _waits(self, stage: Stage) -> bool:
        search, turns = self.search, self._turns.get(stage.name)
        stuck = turns is not None and turns.empty >= 2 and turns.stuck_at == search.state
        early = self._num_turns < stage.first_turn
        return (
            early or stage.name in self._ended or stuck or search.gap < stage.min_gap or not stage.applies(self.problem, search)
        )

    def _go_on(self, stage: Stage, work: Work) -> None:
        """One slice; it doubles each time. A stage that got nowhere twice waits until others have changed something."""
        if stage.name not in self._turns:
            own = Work(meter=work.meter)
            self._turns[stage.name] = _Turns(stage.run(self.problem, self.search, own), own)
        turns = self._turns[stage.name]
        before, spent = self.search.state, work.meter.spent
        turns.work.until = work.share(turns.slice).until
        got_on = False
        while not turns.work.is_over and not self._is_good:
            turns.work.charge(300 * EVENT_UNITS)  # so that a slice ends even if the stage charges nothing
            try:
                got_on = next(turns.generator) is not stages.Progress.NOTHING or got_on
            except StopIteration:
                self._ended.add(stage.name)
                break
        after = self.search.state
        turns.slice *= 2
        turns.empty, turns.stuck_at = (0, None) if got_on or after != before else (turns.empty + 1, after)
        self.spent += work.meter.spent - spent
        SOLVER.debug(
            "%s within %d bytes: %.3f units of work, time and bound %s -> %s", stage.name, self.problem.budget_bytes,
            work.meter.spent - spent, before, after,
        )  # fmt: skip


def run(runs: Sequence[Run], work: Work) -> None:
    """Give the searches their turns, the widest gap first, until all are done or the work is over."""
    while not work.is_over:
        waiting = sorted((run for run in runs if not run.is_done), key=lambda run: -run.search.gap)
        if not waiting:
            return
        for each in waiting:
            each.turn(work)
