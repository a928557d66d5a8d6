"""The plan that a user holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from planner import arguments
from planner.analysis.explain import explain
from planner.analysis.sweep import SweptGraph
from planner.errors import warn
from planner.graph.planned import PlannedGraph
from planner.limits import DEFAULT_EFFORT, Limits
from planner.report import perfetto, plan_table, timeline
from planner.results import html_report, plan_file
from planner.results.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Plan(PlannedGraph):
    """A graph, a budget and the schedule that fits it. Prints as a table; attributes as in `PlannedGraph`."""

    def __str__(self) -> str:
        return plan_table.text(self)

    def explain(self, *, prices: bool = True, effort: float = DEFAULT_EFFORT, time_limit_s: float | None = None) -> Explanation:
        """Why it keeps what it keeps, by module, and what a little more or less memory would be worth.

        Returns:
            the Explanation, which prints as a table.
        """
        arguments.check_flags(prices=prices)
        limits = Limits(arguments.effort(effort), None if time_limit_s is None else arguments.seconds(time_limit_s))
        found = explain(self, prices=prices, limits=limits)
        return Explanation(found.plan, found.rows, found.more, found.less)

    def plot(self, path: str | Path) -> None:
        """Draw live bytes over the step, plain above planned, into a .png or .svg file.

        Raises:
            PlotMissingError: matplotlib (the extra `plot`) is not installed.
            InputError: another suffix, or the file cannot be written.
        """
        arguments.check_path(path)
        timeline.plot(self, path)

    def html(self, path: str | Path, sweep: SweptGraph | None = None) -> None:
        """Write an interactive report: one HTML file that loads nothing from elsewhere (docs/report.md).

        Args:
            path: of the file; overwritten.
            sweep: plans of the same graph, for the curve and a slider, such as a `Sweep`. Default: this plan alone.

        Raises:
            PlotMissingError: plotly (the extra `report`) is not installed.
            InputError: the sweep is of another graph, or the file cannot be written.
        """
        arguments.check_path(path)
        html_report.write(self, path, sweep)

    def perfetto(self, path: str | Path) -> None:
        """Write the plain and the planned step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

        Raises:
            InputError: the file cannot be written.
        """
        perfetto.write(self, path)

    def trace(self, path: str | Path) -> None:
        """Deprecated: the former name of `perfetto`."""
        warn("Plan.trace is now Plan.perfetto", DeprecationWarning)
        self.perfetto(path)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (docs/plan-file.md).

        Raises:
            InputError: the file cannot be written.
        """
        plan_file.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanFileError: not JSON, another schema version, or inconsistent.
        """
        return plan_file.load(path, Plan)


def as_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan, or the one in the file of this name.

    Raises:
        InputError: neither.
        PlanFileError: the file cannot be read.
    """
    if isinstance(plan, (str, os.PathLike)):
        return Plan.load(plan)
    arguments.check_plan(plan, Plan)
    return plan
