"""The order of the stages, and the one loop that gives them their turns.

A turn gives a slice of work to every stage that does not wait; each slice of a stage is twice as large as its last one. So a
stage that needs little ends early, and one that needs much gets it after the others ran.

A search stops when
- its gap is reached, or it is proven that nothing fits (`BudgetSearch._is_good`, looked at after every yield of a stage),
- its gap is at most LOOSE_GAP and not worth more than the work spent so far (`BudgetSearch.is_done`, looked at between slices),
- every stage waits in a turn in which all of them may run (`BudgetSearch.turn`),
- the work, or as a backstop the clock, has run out (`Work.is_over`).

No search begins for a budget below the floor. The bisection of `Solver.lowest_peak` also stops where its ends are `GAP` apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.log import SOLVER
from planner.solver import stages
from planner.solver.problem import Problem
from planner.solver.search import Search
from planner.solver.tuning import EVENT_UNITS, FIRST_SLICE, LOOSE_GAP, PATIENCE
from planner.solver.work import Work


@dataclass(frozen=True, slots=True)
class Stage:
    """A strategy and when it has its turn.

    Attributes:
        name: for the log; no two stages have the same.
        run: the strategy.
        min_gap: it waits while the gap, as a fraction of the plain step's time, is smaller.
        first_turn: the number of turns that it waits; the slices of the other stages double in each of them.
        found: where not None, it waits until a schedule that fits was found (True), or once one was (False).
    """

    name: str
    run: stages.Strategy
    min_gap: float = 0.0
    first_turn: int = 0
    found: bool | None = None


PIPELINE = (
    # Bounds; what they keep is most often nearly optimal.
    Stage("certificate", stages.certificate),
    # Long chains, and budgets that take more than one recompute of a value.
    Stage("segments", stages.segments, min_gap=LOOSE_GAP, first_turn=1),
    # Where the gap is wide: a plan is then no slower than the reference schedules that fit.
    Stage("baselines", stages.baselines, min_gap=LOOSE_GAP, first_turn=1),
    # Budgets near the lowest peak there is.
    Stage("descent", stages.descent, first_turn=1, found=False),
    # What is a few values away from the schedules at hand, and half-way there neither lower nor cheaper.
    Stage("exchange", stages.exchange, min_gap=LOOSE_GAP, first_turn=4),
    # As the descent: from candidates for less.
    Stage("smaller budgets", stages.smaller_budgets, first_turn=2, found=False),
    # What cuts cannot say: a value made again several times, also within the forward.
    Stage("local search", stages.local_search, first_turn=2, found=True),
)


@dataclass(slots=True)
class _StageState:
    """A running stage: generator, work, next slice, slices without progress, and the search's state after the last of these."""

    generator: Iterator[stages.Progress]
    work: Work
    slice: float = FIRST_SLICE
    empty: int = 0
    stuck_at: tuple[int, int] | None = None


class BudgetSearch:
    """One budget's search under way.

    Attributes:
        problem, search: what is looked for, and what was found.
        spent: units of work so far.
    """

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.spent = 0.0
        self._states: dict[str, _StageState] = {}
        self._ended: set[str] = set()
        self._num_turns = 0
        self._has_more = True

    @property
    def is_done(self) -> bool:
        """The plan is good enough, nothing can fit, or nothing is left to try."""
        gap = self.search.gap
        is_enough = gap <= LOOSE_GAP and self.spent >= PATIENCE * (100 * gap) ** 2
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
            self._run_slice(stage, work)
        self._num_turns += 1

    def _waits(self, stage: Stage) -> bool:
        search, state = self.search, self._states.get(stage.name)
        stuck = state is not None and state.empty >= 2 and state.stuck_at == search.state
        early = self._num_turns < stage.first_turn
        other = stage.found not in (None, search.best is not None)
        return early or other or stage.name in self._ended or stuck or search.gap < stage.min_gap

    def _run_slice(self, stage: Stage, work: Work) -> None:
        """One slice; it doubles each time. A stage without progress in two slices waits until others change the search."""
        if stage.name not in self._states:
            own = Work(meter=work.meter)
            self._states[stage.name] = _StageState(stage.run(self.problem, self.search, own), own)
        state = self._states[stage.name]
        before, spent = self.search.state, work.meter.spent
        state.work.until = work.share(state.slice).until
        progressed = False
        while not state.work.is_over and not self._is_good:
            state.work.charge(300 * EVENT_UNITS)  # so that a slice ends even if the stage charges nothing
            try:
                progressed = next(state.generator) is not stages.Progress.TRIED or progressed
            except StopIteration:
                self._ended.add(stage.name)
                break
        after = self.search.state
        state.slice *= 2
        state.empty, state.stuck_at = (0, None) if progressed or after != before else (state.empty + 1, after)
        self.spent += work.meter.spent - spent
        text = "%s within %d bytes: %.3f units of work; %s -> %s"
        SOLVER.debug(text, stage.name, self.problem.budget_bytes, work.meter.spent - spent, _shown(before), _shown(after))


def _shown(state: tuple[int, int]) -> str:
    best_ns, bound_ns = state
    return f"{'no schedule' if best_ns < 0 else f'best {best_ns} ns'}, bound {bound_ns} ns"


def search_all(searches: Sequence[BudgetSearch], work: Work) -> None:
    """Give the searches their turns, the widest gap first, until all are done or the work is over."""
    while not work.is_over:
        waiting = sorted((one for one in searches if not one.is_done), key=lambda one: -one.search.gap)
        if not waiting:
            return
        for each in waiting:
            each.turn(work)
