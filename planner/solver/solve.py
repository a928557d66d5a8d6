"""The cheapest schedule within a budget; many budgets at once; the lowest budget there is a schedule for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.floor import floor, infeasible
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, check
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.baselines import fixed_baselines, greedy
from planner.solver.forward_end import with_forward_end
from planner.solver.pipeline import BudgetSearch, search_all
from planner.solver.problem import Models, Problem
from planner.solver.reorder import reordered
from planner.solver.search import Archive, Search
from planner.solver.tuning import GAP, LOOSE_GAP
from planner.solver.work import Meter, Work, begin
from planner.units import enough_text, format_bytes

__all__ = ["Solver", "floor", "lowest_peak", "solve", "sweep"]

Outcome = Solution | InfeasibleBudgetError | NoScheduleFoundError
"""Of the search for one budget: a schedule, or why there is none."""


def solve(graph: Graph, budget_bytes: int, limits: Limits | None = None, *, gap: float = GAP, reorder: bool = True) -> Solution:
    """The cheapest schedule found whose simulated peak on `graph` is within the budget; the same one for the same arguments.

    Args:
        graph: the joint graph; the budget holds everything live on the device.
        budget_bytes: bound on the live bytes at every step.
        limits: what search and certificate together may spend. A plan that the clock ended says so: it may differ from run
            to run.
        gap: how far from the optimum to stop, as a fraction of the plain step's time.
        reorder: backward ops may move a few places where that lowers the plain step's peak, unless the graph forbids it.

    Raises:
        InfeasibleBudgetError: proven: no schedule fits.
        NoScheduleFoundError: nothing was found with this effort.
        SolverMissingError: HiGHS cannot be run.
    """
    return Solver(graph, reorder=reorder).solve(budget_bytes, limits, gap=gap)


def sweep(graph: Graph, budgets_bytes: Iterable[int], limits: Limits | None = None, *, gap: float = GAP) -> dict[int, Outcome]:
    """`solve` for many budgets, in little more work than for a few; see `Solver.sweep`."""
    return Solver(graph).sweep(budgets_bytes, limits, gap=gap)


def lowest_peak(graph: Graph, limits: Limits | None = None) -> int:
    """The lowest peak, in bytes, of any schedule this solver finds: a budget that `solve` can meet."""
    return Solver(graph).lowest_peak(limits)


class Solver:
    """One graph, any number of budgets.

    The programs with what they learnt and every schedule that was found are shared, so a later budget takes less work, and
    never gets a worse plan than a smaller one got. A plan therefore depends on what was asked before, and on nothing else.
    """

    def __init__(self, graph: Graph, *, reorder: bool = True) -> None:
        """`reorder`: backward ops may move a few places where that lowers the plain step's peak (`planner.solver.reorder`)."""
        self._captured = graph
        several = graph.in_flight > 1
        marked = with_forward_end(graph) if several else graph
        self.graph, order = reordered(marked) if reorder else (marked, tuple(range(len(marked.ops))))
        self._is_moved = self.graph is not marked
        # For each op of the graph that is searched, its index in the captured one; -1: the op at the end of the forward.
        end = graph.num_forward_ops
        self._order = tuple(-1 if i == end else i - (i > end) for i in order) if several else order
        self.models, self.archive = Models(self.graph), Archive(self.graph)
        self._unmoved: Solver | None = None
        self._has_baselines = False

    @property
    def floor_bytes(self) -> int:
        """The least that any schedule in captured order, or with the backward ops moved as here, can reach."""
        return min(floor(self.graph)[0], floor(self._captured)[0])

    def offer_baselines(self, budget_bytes: int) -> None:
        """Evaluate the reference schedules: on the moved graph, and on the captured one in the moved graph's numbers."""
        for graph, renumbered in ((self.graph, False), *([(self._captured, True)] if self._is_moved else [])):
            for name, schedule in [
                ("greedy", greedy(graph, budget_bytes)),
                *(() if self._has_baselines else fixed_baselines(graph)),
            ]:
                self.archive.offer(self._renumbered(schedule) if renumbered else schedule, name)
        self._has_baselines = True

    def offer(self, schedule: Schedule, source: str) -> int:
        """Let a schedule of the captured graph compete; its peak in bytes.

        Raises:
            ScheduleError: it is none of this graph.
        """
        check(self._captured, schedule)
        return self.archive.offer(self._renumbered(schedule), source).peak_bytes

    def _renumbered(self, schedule: Schedule) -> Schedule:
        """A schedule of the captured graph in the numbers of the graph that is searched."""
        here = {i: n for n, i in enumerate(self._order)}
        steps = [here[i] for i in schedule.steps]
        if -1 in here:
            steps.insert(schedule.boundary(self._captured), here[-1])
        return Schedule(tuple(steps))

    def _as_captured(self, schedule: Schedule) -> Schedule:
        """The other way round."""
        return Schedule(tuple(self._order[i] for i in schedule.steps if self._order[i] >= 0))

    def solve(self, budget_bytes: int, limits: Limits | None = None, *, gap: float = GAP) -> Solution:
        """As the function `solve`."""
        [outcome] = self.sweep([budget_bytes], limits, gap=gap).values()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def sweep(self, budgets_bytes: Iterable[int], limits: Limits | None = None, *, gap: float = GAP) -> dict[int, Outcome]:
        """A solution, or why there is none, for every budget; a larger budget never has a dearer plan.

        Args:
            budgets_bytes: in any order.
            limits: for all budgets together.
            gap: how far from the optimum to stop, as a fraction of the plain step's time.
        """
        work = begin(limits or Limits())
        outcomes: dict[int, Outcome] = {}
        runs: dict[int, tuple[Solver, BudgetSearch]] = {}
        for budget in sorted(set(budgets_bytes)):
            solver = self._of_order(budget)
            if solver is None:
                outcomes[budget] = infeasible(min(self.graph, self._captured, key=lambda graph: floor(graph)[0]), budget)
            else:
                runs[budget] = solver, solver._new_search(budget, gap)
        search_all([one for _, one in reversed(runs.values())], work)
        for budget, (solver, one) in runs.items():
            outcome = outcomes[budget] = solver._outcome(one, work.meter)
            if solver is not self and isinstance(outcome, Solution):  # a plan for every larger budget, too
                self.archive.offer(self._renumbered(outcome.schedule), outcome.solver)
        return outcomes

    def lowest_peak(self, limits: Limits | None = None) -> int:
        """As the function `lowest_peak`."""
        work = begin(limits or Limits())
        lowest = self._lowest(work.share(work.left / 2) if self._is_moved else work)
        if self._is_moved and floor(self._captured)[0] < lowest:
            lowest = min(lowest, Solver(self._captured, reorder=False)._lowest(work))
        return lowest

    def _lowest(self, work: Work) -> int:
        """Whether anything fits is asked of the stages: for the floor, then by bisection, each with a share of the work."""
        asked = low = least = floor(self.graph)[0]
        self.offer_baselines(asked)
        high = self.archive.lowest.timeline.peak_bytes
        while high > low and not work.is_over:
            search_all([self._new_search(asked, math.inf)], work.share(work.left / 4))
            high = self.archive.lowest.timeline.peak_bytes
            low = least if high <= asked else asked + 1  # from a lower start, what failed before may succeed
            if high - low <= GAP * high:
                break
            asked = (low + high) // 2
        return high

    def _new_search(self, budget_bytes: int, gap: float) -> BudgetSearch:
        return BudgetSearch(Problem(self.models, budget_bytes, gap), Search(self.archive, budget_bytes))

    def _of_order(self, budget_bytes: int) -> Solver | None:
        """The solver whose order of the backward can meet a budget: this one, that of the captured order, or neither."""
        if floor(self.graph)[0] <= budget_bytes:
            return self
        if floor(self._captured)[0] > budget_bytes:
            return None
        if self._unmoved is None:
            self._unmoved = Solver(self._captured, reorder=False)
        return self._unmoved

    def _outcome(self, one: BudgetSearch, meter: Meter) -> Solution | NoScheduleFoundError:
        search = one.search
        seconds = meter.elapsed_s * (one.spent / meter.spent if meter.spent else 1.0)
        if search.gap > LOOSE_GAP:  # however little was spent, the plan is no slower than the reference schedules
            self.offer_baselines(search.budget_bytes)
        best = search.best
        if best is None:
            return not_found(search.budget_bytes, self.archive.lowest.timeline.peak_bytes, floor(self.graph)[0], seconds)
        status = "optimal" if search.gap <= one.problem.gap else "feasible"
        schedule = self._as_captured(best.schedule)
        bound_ns = min(search.bound_ns, best.timeline.time_ns)
        limit = "time" if meter.is_late and not one.is_done else ""
        return Solution(status, schedule, bound_ns, seconds, best.source, one.spent, limit)


def not_found(budget_bytes: int, lowest_bytes: int, floor_bytes: int, seconds: float) -> NoScheduleFoundError:
    """The error for a budget that nothing was found for."""
    message = not_found_text(format_bytes(budget_bytes), lowest_bytes, floor_bytes, seconds, lowest_bytes)
    return NoScheduleFoundError(message, lowest_bytes=lowest_bytes, floor_bytes=floor_bytes, solve_s=seconds)


def not_found_text(
    budget: str, lowest_bytes: int, floor_bytes: int, seconds: float, enough_bytes: int, *, is_least_batch: bool = False
) -> str:
    """The message of a NoScheduleFoundError.

    Args:
        budget: what was asked for, in words.
        enough_bytes: what can be met.
        is_least_batch: the model runs no smaller one.
    """
    others = "or give more effort" if is_least_batch else "give more effort, or reduce the batch"
    return (
        f"Raise the budget to {enough_text(enough_bytes)} ({enough_bytes} bytes), {others}: no schedule within {budget} was "
        f"found in {seconds:.1f} s. That none exists was not proven (the proven floor is {format_bytes(floor_bytes)}). The "
        f"lowest peak found is {format_bytes(lowest_bytes)} ({lowest_bytes} bytes)"
    )
