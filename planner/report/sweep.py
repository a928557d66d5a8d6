"""A sweep: what a training step costs at many budgets, from one graph and one solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from planner.arguments import check_path, count
from planner.errors import InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.plan import Plan, Solution
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.simulate import Timeline, simulate
from planner.limits import Limits
from planner.report.budgets import Budget, asked_budgets, restated, spread
from planner.solver.solve import Solver
from planner.units import enough_text, format_bytes, parse_budget, shown

if TYPE_CHECKING:
    from pathlib import Path

_LOWEST_SHARE = 0.1
"""Of the time, for the lowest peak that can be reached: the first budget where none is given."""


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
class Miss:
    """A budget without a plan. `error`: the name of the error that planning for it alone would raise; `reason`: its text."""

    budget_bytes: int
    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A plain and a planned step that were run.

    Attributes:
        budget_bytes: which point.
        peak_bytes: of the planned step, everything resident included.
        time_ratio: planned over plain step; None where the plain step did not fit.
        exact: outputs, gradients, buffers and random state were bit-equal.
    """

    budget_bytes: int
    peak_bytes: int
    time_ratio: float | None
    exact: bool


Measure = Callable[[Plan, int], Measured]
"""Runs a plan, so many pairs of steps."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Plans of one graph for many budgets. Prints as a table.

    Attributes:
        graph: what was planned, with the costs that were used.
        points: budgets that have a plan, smallest first.
        misses: budgets that have none.
        floor_bytes: no schedule has a lower peak.
        floor_op: the op that holds it, with its module; "" for a graph without ops.
        solve_s: wall seconds for all budgets together.
        provenance: as in `Plan`.
        measured: what `verify` measured.
        measure: runs a plan of this sweep; None in a sweep that was read from a file or made of a graph.
    """

    graph: Graph
    points: tuple[Point, ...]
    misses: tuple[Miss, ...]
    floor_bytes: int
    floor_op: str
    solve_s: float
    provenance: Provenance | None = None
    measured: tuple[Measured, ...] = ()
    measure: Measure | None = field(default=None, repr=False, compare=False)

    @property
    def plain(self) -> Timeline:
        """The step that keeps everything, simulated."""
        return simulate(self.graph, keep_all(self.graph))

    def plan(self, point: Point) -> Plan:
        """The plan of a point, to save, or to `planner.apply` to the model."""
        return Plan(self.graph, point.budget_bytes, point.margin_bytes, point.solution, self.provenance)

    @property
    def knee_point(self) -> Point:
        """The point farthest below the straight line from the lowest to the highest budget; below it, time grows faster."""
        first, last = self.points[0], self.points[-1]
        width = max(1, last.peak_bytes - first.peak_bytes)
        height = max(1, first.time_ns - last.time_ns)
        return min(self.points, key=lambda point: (point.peak_bytes / width + point.time_ns / height, point.peak_bytes))

    @property
    def knee(self) -> Plan:
        """The plan suggested where no budget is given: see `knee_point`."""
        return self.plan(self.knee_point)

    def best(self, *, budget: Budget | None = None, max_overhead: float | None = None) -> Plan:
        """The fastest plan of the sweep within a budget, or the one with the lowest peak within an overhead.

        Args:
            budget: as for `planner.plan`. A budget between two points gets the plan of the smaller one.
            max_overhead: extra time allowed, as a fraction of the plain step: 0.05 is 5 %.

        Raises:
            BudgetError, InputError: unreadable, or not exactly one of the two given.
            InfeasibleBudgetError: no schedule fits the budget.
            NoScheduleFoundError: no point of the sweep is within it.
        """
        if (budget is None) == (max_overhead is None):
            raise InputError("best() takes either budget= or max_overhead=")
        if budget is not None:
            return self.plan(self._within(parse_budget(budget, self.plain.peak_bytes)))
        assert max_overhead is not None
        if isinstance(max_overhead, bool) or not isinstance(max_overhead, (int, float)) or not max_overhead >= 0:
            raise InputError(f"max_overhead={shown(max_overhead)} must be a fraction of the plain step's time, such as 0.05")
        cheap = [point for point in self.points if point.overhead <= max_overhead]
        if not cheap:
            least = min(point.overhead for point in self.points)
            raise NoScheduleFoundError(
                f"no point of this sweep has an overhead of at most {max_overhead:.2%}; the least is {least:.2%}. "
                "Allow that, or sweep larger budgets."
            )
        return self.plan(min(cheap, key=lambda point: (point.peak_bytes, point.time_ns)))

    def _within(self, budget_bytes: int) -> Point:
        fitting = [point for point in self.points if point.budget_bytes <= budget_bytes]
        if fitting:
            return min(fitting, key=lambda point: (point.time_ns, point.peak_bytes))
        smallest = self.points[0].budget_bytes
        if budget_bytes < self.floor_bytes:
            raise InfeasibleBudgetError(
                f"budget {format_bytes(budget_bytes)} is below {enough_text(self.floor_bytes)}, the least any schedule of "
                f"this graph can reach (op {self.floor_op}). Raise the budget to {enough_text(smallest)} ({smallest} bytes), "
                "the smallest that has a plan in this sweep, or reduce the batch.",
                budget_bytes=budget_bytes,
                floor_bytes=self.floor_bytes,
            )
        raise NoScheduleFoundError(
            f"the smallest budget of this sweep that has a plan is {enough_text(smallest)} ({smallest} bytes), above "
            f"{format_bytes(budget_bytes)} (the proven floor is {format_bytes(self.floor_bytes)}). "
            "Raise the budget to that, or plan for it alone."
        )

    def verify(self, n: int = 5, *, rounds: int = 3) -> Sweep:
        """This sweep with the peaks and times of `n` evenly chosen points measured, as `planner.verify` measures them.

        Args:
            n: how many points, the lowest and the highest budget among them.
            rounds: pairs of plain and planned steps that are timed.

        Raises:
            InputError: `n` is not positive, or the sweep came from a file or a bare graph: there is no model to run.
        """
        n, rounds = count(n, "n"), count(rounds, "rounds")
        if self.measure is None:
            raise InputError("this sweep holds no model to run: only one that planner.sweep(model, ...) returned can verify")
        last = len(self.points) - 1
        chosen = sorted({round(k * last / max(1, n - 1)) for k in range(n)})
        return replace(self, measured=tuple(self.measure(self.plan(self.points[k]), rounds) for k in chosen))

    def __str__(self) -> str:
        from planner.report.sweeptable import text

        return text(self)

    def plot(self, path: str | Path) -> None:
        """Draw peak against step time into a .png or .svg file.

        Raises:
            PlotMissingError: matplotlib (the extra `plot`) is not installed.
            InputError: another suffix, or the file cannot be written.
        """
        check_path(path)
        from planner.report.sweepplot import plot

        plot(self, path)

    def save(self, path: str | Path) -> None:
        """Write the sweep as JSON (docs: planner/report/sweepfile.py)."""
        check_path(path)
        from planner.report.sweepfile import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Sweep:
        """Read a sweep written by `save`.

        Raises:
            PlanFileError: not JSON, a newer schema, or inconsistent.
        """
        check_path(path)
        from planner.report.sweepfile import load

        return load(path)


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
    measure: Measure | None = None,
) -> Sweep:
    """Plan a graph for many budgets.

    Args:
        graph: the joint graph.
        budgets, points, low, high: which budgets; see `planner.sweep`.
        margin: bytes of a budget to leave free for the allocator; grows with the budget up to the plain peak, where it ends.
        limits: for all budgets together (default: an effort of 4.0).
        provenance, measure: kept in the sweep.

    Raises:
        BudgetError: an impossible range.
        InfeasibleBudgetError, NoScheduleFoundError: not one of the budgets has a plan; the error of the largest.
    """
    start = time.monotonic()
    plain_bytes = simulate(graph, keep_all(graph)).peak_bytes
    asked = asked_budgets(budgets, points, low, high, plain_bytes)
    solver, limits = Solver(graph), limits or Limits(4.0)
    if asked is None:
        lowest = solver.lowest_peak(limits.share(_LOWEST_SHARE)) + margin(plain_bytes - 1)
        highest = plain_bytes if high is None else parse_budget(high, plain_bytes)
        asked = spread(min(lowest, highest), highest, points)
    found = solver.sweep([budget - margin(budget) for budget in asked], limits.share(1 - _LOWEST_SHARE))
    made, misses = [], []
    for budget in asked:
        answer = found[budget - margin(budget)]
        if isinstance(answer, Solution):
            made.append(make_point(graph, budget, margin(budget), answer))
        else:
            lowest = solver.archive.lowest.timeline.peak_bytes
            error = answer
            said = restated(error, format_bytes(budget), budget, margin, lowest)
            misses.append(Miss(budget, type(error).__name__, str(said)))
    if not made:
        lowest = solver.lowest_peak(limits)
        raise restated(error, format_bytes(budget), budget, margin, lowest)
    floor_bytes, floor_op = _floor(graph, solver)
    return Sweep(graph, tuple(made), tuple(misses), floor_bytes, floor_op, time.monotonic() - start, provenance, (), measure)


def _floor(graph: Graph, solver: Solver) -> tuple[int, str]:
    """The proven floor of the captured or the moved graph, whichever is lower, and the op that holds it."""
    least, i, judged = min(((*floor(judged), judged) for judged in (graph, solver.graph)), key=lambda entry: entry[0])
    if i < 0:
        return least, ""
    op = judged.ops[i]
    return least, f"{op.name} ({op.source})" if op.source else op.name
