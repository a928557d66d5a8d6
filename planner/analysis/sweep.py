"""Plan one graph for many budgets, with one solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.analysis.budgets import Budget, asked_budgets, restated, spread
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.simulate import Timeline, simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.solve import Solver
from planner.units import format_bytes, parse_budget

_LOWEST_SHARE = 0.1
"""Of the effort, for the lowest peak that can be reached: the first budget where none is given."""


@dataclass(frozen=True, slots=True)
class Point:
    """One budget that has a plan.

    Attributes:
        budget_bytes, margin_bytes, solution: as in `Plan`.
        peak_bytes, time_ns: of the planned step, simulated.
        plain_ns: time of the plain step.
    """

    budget_bytes: int
    margin_bytes: int
    solution: Solution
    peak_bytes: int
    time_ns: int
    plain_ns: int

    @property
    def bound_ns(self) -> int:
        """No schedule that fits takes less time (for this backward order at these costs)."""
        return self.solution.bound_ns

    @property
    def status(self) -> str:
        """As the solution's: "optimal" or "feasible"."""
        return self.solution.status

    @property
    def overhead(self) -> float:
        """Extra time, as a fraction of the plain step."""
        return self.time_ns / max(1, self.plain_ns) - 1

    @property
    def gap(self) -> float:
        """At most this fraction of the plain step could be saved by a better schedule."""
        return max(0, self.time_ns - self.bound_ns) / max(1, self.plain_ns)


@dataclass(frozen=True, slots=True)
class InfeasiblePoint:
    """A budget without a plan. `error`: the name of the error that planning for it alone would raise; `reason`: its text."""

    budget_bytes: int
    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A plain and a planned step that were run.

    Attributes:
        budget_bytes: which point.
        peak_bytes: of the planned step, everything resident included.
        time_ratio: planned over plain step; None where the plain step did not fit.
        exact: outputs, gradients, buffers and random state were bit-equal.
        time_spread: lowest and highest ratio of a pair of steps; None where none was timed.
    """

    budget_bytes: int
    peak_bytes: int
    time_ratio: float | None
    exact: bool
    time_spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class SweptGraph:
    """Plans of one graph for many budgets: the data of a `Sweep`.

    Attributes:
        graph: what was planned, with the costs that were used.
        points: budgets that have a plan, smallest first.
        infeasible: budgets that have none.
        floor_bytes: no schedule has a lower peak.
        floor_op: the op that holds it, with its module; "" for a graph without ops.
        solve_s: wall seconds for all budgets together.
        provenance: as in `Plan`.
        measured: what `Sweep.verify` measured.
    """

    graph: Graph
    points: tuple[Point, ...]
    infeasible: tuple[InfeasiblePoint, ...]
    floor_bytes: int
    floor_op: str
    solve_s: float
    provenance: Provenance | None = None
    measured: tuple[MeasuredPoint, ...] = ()

    @property
    def plain(self) -> Timeline:
        """The step that keeps everything, simulated."""
        return simulate(self.graph, keep_all(self.graph))

    @property
    def knee_point(self) -> Point:
        """The point farthest below the straight line from the lowest to the highest budget; below it, time grows faster."""
        first, last = self.points[0], self.points[-1]
        width = max(1, last.peak_bytes - first.peak_bytes)
        height = max(1, first.time_ns - last.time_ns)
        return min(self.points, key=lambda point: (point.peak_bytes / width + point.time_ns / height, point.peak_bytes))

    def within(self, peak_bytes: int) -> Point | None:
        """The fastest point that peaks no higher; None where there is none."""
        fitting = [point for point in self.points if point.peak_bytes <= peak_bytes]
        return min(fitting, key=lambda point: point.time_ns, default=None)


def make_point(graph: Graph, budget_bytes: int, margin_bytes: int, solution: Solution) -> Point:
    """A point with the figures that `simulate` gives it.

    Raises:
        ScheduleError: the schedule cannot run on the graph.
    """
    timeline = simulate(graph, solution.schedule)
    return Point(budget_bytes, margin_bytes, solution, timeline.peak_bytes, timeline.time_ns, graph.plain_ns)


def sweep_graph(
    graph: Graph,
    budgets: Sequence[Budget] | None = None,
    *,
    points: int = 20,
    low: Budget | None = None,
    high: Budget | None = None,
    margin: Callable[[int], int] = lambda budget_bytes: 0,
    limits: Limits | None = None,
    provenance: Provenance | None = None,
) -> SweptGraph:
    """Plan a graph for many budgets.

    Args:
        graph: the joint graph.
        budgets, points, low, high: which budgets; see `planner.sweep`.
        margin: bytes of a budget to leave free for the allocator; grows with the budget up to the plain peak, where it ends.
        limits: for all budgets together (default: `Limits()`).
        provenance: kept in the sweep.

    Raises:
        BudgetError: an impossible range.
        InfeasibleBudgetError, NoScheduleFoundError: not one of the budgets has a plan; the error of the largest.
    """
    start = time.monotonic()
    plain_bytes = simulate(graph, keep_all(graph)).peak_bytes
    asked = asked_budgets(budgets, points, low, high, plain_bytes)
    solver, limits = Solver(graph), limits or Limits()
    if asked is None:
        lowest = solver.lowest_peak(limits.share(_LOWEST_SHARE)) + margin(plain_bytes - 1)
        highest = plain_bytes if high is None else parse_budget(high, plain_bytes)
        asked = spread(min(lowest, highest), highest, points)
    found = solver.sweep([budget - margin(budget) for budget in asked], limits.share(1 - _LOWEST_SHARE))
    made, infeasible = [], []
    for budget in asked:
        answer = found[budget - margin(budget)]
        if isinstance(answer, Solution):
            made.append(make_point(graph, budget, margin(budget), answer))
        else:
            lowest = solver.archive.lowest.timeline.peak_bytes
            error = answer
            said = restated(error, format_bytes(budget), budget, margin, lowest)
            infeasible.append(InfeasiblePoint(budget, type(error).__name__, str(said)))
    if not made:
        lowest = solver.lowest_peak(limits)
        raise restated(error, format_bytes(budget), budget, margin, lowest)
    floor_bytes, floor_op = proven_floor(graph, solver)
    return SweptGraph(graph, tuple(made), tuple(infeasible), floor_bytes, floor_op, time.monotonic() - start, provenance)


def proven_floor(graph: Graph, solver: Solver) -> tuple[int, str]:
    """The proven floor of the captured or the moved graph, whichever is lower, and the op that holds it ("" without ops)."""
    floors = ((*floor(each), each) for each in (graph, solver.graph))
    least, i, lower = min(floors, key=lambda entry: entry[0])
    if i < 0:
        return least, ""
    return least, lower.ops[i].text
