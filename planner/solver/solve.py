"""The cheapest schedule within a budget: coarsen, solve the program, search around its answer, expand, simulate, certify."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.plan import Solution
from planner.graph.schedule import Schedule
from planner.solver.baselines import all_baselines
from planner.solver.blocks import MOST_PIECES
from planner.solver.bound import Bounds
from planner.solver.closure import Closure
from planner.solver.coarsen import Coarse, coarsen, uncoarsened
from planner.solver.floor import floor, infeasible
from planner.solver.hunt import Hunt, lower_peak
from planner.solver.pieces import Pieces
from planner.solver.pool import Pool
from planner.solver.reorder import reordered
from planner.units import enough_text, format_bytes

__all__ = ["Solver", "floor", "lowest_peak", "solve", "sweep"]

_OVERRUN = 0.06
"""Share of a sweep's time by which its stages end later than they are told."""
_LEAST_S = 0.1
"""What is left to search when the programs took all of the time to be built."""


def solve(graph: Graph, budget_bytes: int, *, time_limit_s: float = 10.0, gap: float = 0.001, reorder: bool = True) -> Solution:
    """The cheapest schedule found whose simulated peak on `graph` is within the budget.

    Args:
        graph: the joint graph; the budget holds everything live on the device.
        budget_bytes: bound on the live bytes at every step.
        time_limit_s: wall seconds for search and certificate together.
        gap: how far from the optimum to stop, as a fraction of the plain step's time.
        reorder: backward ops may move a few places where that lowers the plain step's peak.

    Raises:
        InfeasibleBudgetError: proven: no schedule fits.
        NoScheduleFoundError: nothing was found in the time given.
        SolverMissingError: neither HiGHS nor CBC can be run.
    """
    end = time.monotonic() + time_limit_s
    solver = Solver(graph, reorder=reorder)
    return solver.solve(budget_bytes, time_limit_s=max(_LEAST_S, end - time.monotonic()), gap=gap)


def sweep(
    graph: Graph, budgets_bytes: Iterable[int], *, time_limit_s: float = 20.0, gap: float = 0.001
) -> dict[int, Solution | InfeasibleBudgetError | NoScheduleFoundError]:
    """`solve` for many budgets, in little more time than for a few; see `Solver.sweep`."""
    end = time.monotonic() + time_limit_s
    solver = Solver(graph)
    return solver.sweep(budgets_bytes, time_limit_s=max(_LEAST_S, end - time.monotonic()), gap=gap)


def lowest_peak(graph: Graph, *, time_limit_s: float = 10.0) -> int:
    """The lowest peak, in bytes, of any schedule this solver finds: a budget that `solve` can meet."""
    return Solver(graph).lowest_peak(time_limit_s=time_limit_s)


class Solver:
    """One graph, any number of budgets.

    The coarse graph, the programs with what they learnt, the certificate's programs and every schedule that was found are
    shared, so a later budget takes less time, and never gets a worse plan than a smaller one got.
    """

    def __init__(self, graph: Graph, *, reorder: bool = True) -> None:
        """`reorder`: backward ops may move a few places where that lowers the plain step's peak (`planner.solver.reorder`)."""
        self._captured = graph
        self.graph, self._order = reordered(graph) if reorder else (graph, tuple(range(len(graph.ops))))
        graph = self.graph
        self.plain_ns = sum(op.cost_ns for op in graph.ops)
        self.pool = Pool(graph)
        self.bounds = Bounds(graph)
        self.coarse = coarsen(graph)
        self.program = Closure(self.coarse.graph, self.coarse.tiny)
        self._fine: tuple[Closure, Coarse] | None = None
        self._unmoved: Solver | None = None
        self._pieces: Pieces | None = None

    @property
    def floor_bytes(self) -> int:
        """The least that any schedule in captured order, or with the backward ops moved as here, can reach."""
        return min(floor(self.graph)[0], floor(self._captured)[0])

    def baselines(self, budget_bytes: int) -> Iterator[tuple[str, Schedule]]:
        """What people do today, by name: of the moved graph, and of the captured one in the moved graph's numbers."""
        yield from all_baselines(self.graph, budget_bytes)
        if self.graph is not self._captured:
            for name, schedule in all_baselines(self._captured, budget_bytes):
                yield name, self._renumbered(schedule)

    def offer_baselines(self, budget_bytes: int) -> None:
        """Judge what people do today."""
        for name, schedule in self.baselines(budget_bytes):
            self.pool.offer(schedule, name)

    def _renumbered(self, schedule: Schedule) -> Schedule:
        """A schedule of the captured graph in the numbers of the moved one."""
        here = {i: n for n, i in enumerate(self._order)}
        return Schedule(tuple(here[i] for i in schedule.steps))

    @property
    def fine(self) -> tuple[Closure, Coarse] | None:
        """The program of the graph as it is; None where nothing was merged."""
        if self._fine is None and len(self.coarse.groups) < len(self.graph.ops):
            coarse = uncoarsened(self.graph)
            self._fine = Closure(coarse.graph, coarse.tiny), coarse
        return self._fine

    @property
    def pieces(self) -> Pieces:
        """The coarse graph in pieces, for blocks."""
        if self._pieces is None:
            self._pieces = Pieces(self.coarse.graph, MOST_PIECES)
        return self._pieces

    def solve(self, budget_bytes: int, *, time_limit_s: float = 10.0, gap: float = 0.001) -> Solution:
        """As the function `solve`."""
        start = time.monotonic()
        if floor(self.graph)[0] > budget_bytes:
            return self._in_captured_order(budget_bytes).solve(budget_bytes, time_limit_s=time_limit_s, gap=gap)
        hunt = Hunt(self, budget_bytes, start, start + time_limit_s, gap)
        hunt.quickly()
        if hunt.best is None:
            lower_peak(self, budget_bytes, (time.monotonic() + start + time_limit_s) / 2)
        hunt.thoroughly()
        if hunt.best is None:
            lower_peak(self, budget_bytes, start + time_limit_s)
        return self._solution(hunt, time.monotonic() - start)

    def sweep(
        self, budgets_bytes: Iterable[int], *, time_limit_s: float = 20.0, gap: float = 0.001
    ) -> dict[int, Solution | InfeasibleBudgetError | NoScheduleFoundError]:
        """A solution, or why there is none, for every budget; a larger budget never has a dearer plan.

        First the quick stages for every budget; then, while there is time, the thorough ones where the gap is widest.

        Args:
            budgets_bytes: in any order.
            time_limit_s: wall seconds for all budgets together.
            gap: how far from the optimum to stop, as a fraction of the plain step's time.
        """
        start = time.monotonic()
        end = start + (1 - _OVERRUN) * time_limit_s
        least = floor(self.graph)[0]
        budgets = sorted(set(budgets_bytes), reverse=True)
        found: dict[int, Solution | InfeasibleBudgetError | NoScheduleFoundError] = {}
        for budget in reversed([budget for budget in budgets if budget < least]):
            try:
                solution = self.solve(budget, time_limit_s=max(0.2, (end - time.monotonic()) / len(budgets)), gap=gap)
                self._know(solution)
                found[budget] = solution
            except (InfeasibleBudgetError, NoScheduleFoundError) as error:
                found[budget] = error
        hunts: dict[int, Hunt] = {}
        seconds = dict.fromkeys(budgets, 0.0)
        for n, budget in enumerate(budgets):
            if budget >= least:
                now = time.monotonic()
                share = max(0.2, (end - now) / (len(budgets) - n))
                hunts[budget] = Hunt(self, budget, now, now + share, gap)
                hunts[budget].quickly()
                seconds[budget] += time.monotonic() - now
        open_hunts = sorted((hunt for hunt in hunts.values() if not hunt.good_enough()), key=lambda hunt: -hunt.left())
        for n, hunt in enumerate(open_hunts):
            now = time.monotonic()
            if now < end:
                hunt.extend(now, now + (end - now) / (len(open_hunts) - n))
                hunt.thoroughly()
                seconds[hunt.budget_bytes] += time.monotonic() - now
        for budget in sorted(hunts):
            try:
                found[budget] = self._solution(hunts[budget], seconds[budget])
            except NoScheduleFoundError as error:
                found[budget] = error
        return found

    def lowest_peak(self, *, time_limit_s: float = 10.0) -> int:
        """As the function `lowest_peak`."""
        moved = self._order != tuple(range(len(self._order)))
        lower_peak(self, 0, time.monotonic() + time_limit_s / (1 + moved))
        lowest = self.pool.lowest.timeline.peak_bytes
        if moved and floor(self._captured)[0] < lowest:
            lowest = min(lowest, Solver(self._captured, reorder=False).lowest_peak(time_limit_s=time_limit_s / 2))
        return lowest

    def _in_captured_order(self, budget_bytes: int) -> Solver:
        """The solver of the unmoved graph, for a budget below the floor of the moved one."""
        if floor(self._captured)[0] > budget_bytes:
            raise infeasible(min((self.graph, self._captured), key=lambda graph: floor(graph)[0]), budget_bytes)
        if self._unmoved is None:
            self._unmoved = Solver(self._captured, reorder=False)
        return self._unmoved

    def _know(self, solution: Solution) -> None:
        """A plan in captured order is a plan for every larger budget."""
        self.pool.offer(self._renumbered(solution.schedule), solution.solver)

    def _solution(self, hunt: Hunt, seconds: float) -> Solution:
        best = hunt.best
        if best is None:
            raise not_found(hunt.budget_bytes, self.pool.lowest.timeline.peak_bytes, floor(self.graph)[0], seconds)
        bound_ns, time_ns = hunt.certify("exact" if time.monotonic() < hunt.end else "linear"), best.timeline.time_ns
        if bound_ns > time_ns:  # contradicted by the schedule at hand: numerical trouble, so claim nothing
            bound_ns = self.plain_ns
        status = "optimal" if time_ns - bound_ns <= hunt.gap * self.plain_ns else "feasible"
        schedule = Schedule(tuple(self._order[i] for i in best.schedule.steps))
        return Solution(status, schedule, bound_ns, seconds, best.solver)


def not_found(budget_bytes: int, lowest_bytes: int, floor_bytes: int, seconds: float) -> NoScheduleFoundError:
    """The error for a budget that nothing was found for."""
    message = not_found_text(format_bytes(budget_bytes), lowest_bytes, floor_bytes, seconds, lowest_bytes)
    return NoScheduleFoundError(message, lowest_bytes=lowest_bytes, floor_bytes=floor_bytes, solve_s=seconds)


def not_found_text(budget: str, lowest_bytes: int, floor_bytes: int, seconds: float, enough_bytes: int) -> str:
    """The message of a NoScheduleFoundError. `budget`: what was asked for, in words; `enough_bytes`: what can be met."""
    return (
        f"no schedule within {budget} was found in {seconds:.1f} s; that none exists was not proven (the proven floor is "
        f"{format_bytes(floor_bytes)}). The lowest peak found is {format_bytes(lowest_bytes)} ({lowest_bytes} bytes). Raise "
        f"the budget to {enough_text(enough_bytes)} ({enough_bytes} bytes), give a longer time limit, or reduce the batch."
    )
