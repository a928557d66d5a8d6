"""The sweep that a user holds: what a training step costs at many budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from planner.analysis.budgets import Budget
from planner.analysis.references import references
from planner.analysis.sweep import InfeasiblePoint, MeasuredPoint, Point, SweptGraph
from planner.arguments import check_path, count
from planner.errors import InfeasibleBudgetError, InputError, NoScheduleFoundError, warn
from planner.graph.floor import has_one_sample
from planner.report import sweep_plot, sweep_table
from planner.results import html_report, sweep_file
from planner.results.plan import Plan
from planner.units import enough_text, format_bytes, parse_budget, shown

Measure = Callable[[Plan, int], MeasuredPoint]
"""Runs a plan for this many pairs of steps."""


@dataclass(frozen=True, slots=True)
class Sweep(SweptGraph):
    """Plans of one graph for many budgets. Prints as a table.

    Attributes:
        measure: runs a plan of this sweep; None in a sweep that was read from a file or made of a graph.
        others: as in `SweptGraph`.
    """

    measure: Measure | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(swept: SweptGraph, measure: Measure | None = None) -> Sweep:
        """The sweep with this data."""
        return Sweep(**{each.name: getattr(swept, each.name) for each in fields(swept)}, measure=measure)

    def plan(self, point: Point) -> Plan:
        """The plan of a point, to save, or to `planner.apply` to the model."""
        return Plan(self.graph, point.budget_bytes, point.margin_bytes, point.solution, self.provenance)

    @property
    def misses(self) -> tuple[InfeasiblePoint, ...]:
        """Deprecated: the former name of `infeasible`."""
        warn("Sweep.misses is now Sweep.infeasible", DeprecationWarning)
        return self.infeasible

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
            smaller = "" if has_one_sample(self.graph) else ", or reduce the batch"
            raise InfeasibleBudgetError(
                f"Raise the budget to {enough_text(smallest)} ({smallest} bytes), the smallest that has a plan in this sweep"
                f"{smaller}: budget {format_bytes(budget_bytes)} is below {enough_text(self.floor_bytes)}, the least "
                f"any schedule of this graph can reach (op {self.floor_op})",
                budget_bytes=budget_bytes,
                floor_bytes=self.floor_bytes,
            )
        raise NoScheduleFoundError(
            f"Raise the budget to {enough_text(smallest)} ({smallest} bytes), the smallest that has a plan in this sweep, or "
            f"plan for {format_bytes(budget_bytes)} alone (the proven floor is {format_bytes(self.floor_bytes)})",
            lowest_bytes=min(point.peak_bytes for point in self.points),
            floor_bytes=self.floor_bytes,
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
        return sweep_table.text(self, references(self.graph))

    def plot(self, path: str | Path) -> None:
        """Draw peak against step time into a .png or .svg file.

        Raises:
            PlotMissingError: matplotlib (the extra `plot`) is not installed.
            InputError: another suffix, or the file cannot be written.
        """
        check_path(path)
        sweep_plot.plot(self, references(self.graph), path)

    def html(self, path: str | Path, plan: Plan | None = None) -> None:
        """Write an interactive report with a slider over the plans: one HTML file that loads nothing (docs/report.md).

        Args:
            path: of the file; overwritten.
            plan: the one that is shown first; of this sweep, or of the same graph. Default: the suggested one (`knee`).

        Raises:
            PlotMissingError: plotly (the extra `report`) is not installed.
            InputError: the plan is of another graph, or the file cannot be written.
        """
        check_path(path)
        html_report.write(self.knee if plan is None else plan, path, self)

    def save(self, path: str | Path) -> None:
        """Write the sweep as JSON (docs: planner/results/sweep_file.py)."""
        check_path(path)
        sweep_file.save(self, path)

    @staticmethod
    def load(path: str | Path) -> Sweep:
        """Read a sweep written by `save`.

        Raises:
            PlanFileError: not JSON, a newer schema, or inconsistent.
        """
        check_path(path)
        return Sweep.of(sweep_file.load(path))
