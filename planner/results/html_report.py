"""The content of HTML reports: a plan, alone or among the plans of a sweep."""

from __future__ import annotations

from pathlib import Path

from planner.analysis.references import references
from planner.analysis.sweep import Point, SweptGraph
from planner.errors import InputError
from planner.graph.planned import PlannedGraph
from planner.report.html import page
from planner.report.html.data import Content

_MOST_PLANS = 60


def write(plan: PlannedGraph, path: str | Path, sweep: SweptGraph | None = None) -> None:
    """Write the report of a plan.

    Raises:
        PlotMissingError: plotly is not installed.
        InputError: the sweep is of another graph, or the file cannot be written.
    """
    page.check()
    page.write(content(plan, sweep), path)


def content(plan: PlannedGraph, sweep: SweptGraph | None = None) -> Content:
    """What a report shows: the plan, among those of the sweep.

    Raises:
        InputError: the sweep is of another graph.
    """
    rivals = references(plan.graph)
    if sweep is None:
        return Content((plan,), 0, rivals)
    if sweep.graph != plan.graph:
        raise InputError("the sweep is of another graph than the plan: make both from one ProfiledStep, or give none")
    others = [planned(sweep, point) for point in _some(sweep) if point.budget_bytes != plan.budget_bytes]
    plans = sorted([plan, *others], key=lambda each: each.budget_bytes)
    return Content(plans, plans.index(plan), rivals, sweep.infeasible, sweep.measured)


def _some(sweep: SweptGraph) -> list[Point]:
    """The points, or as many of them as a report has room for: evenly chosen, and those that were measured."""
    last = len(sweep.points) - 1
    chosen = {round(k * last / (_MOST_PLANS - 1)) for k in range(_MOST_PLANS)}
    measured = {found.budget_bytes for found in sweep.measured}
    return [point for k, point in enumerate(sweep.points) if k in chosen or point.budget_bytes in measured]


def planned(sweep: SweptGraph, point: Point) -> PlannedGraph:
    """The plan of a sweep's point."""
    return PlannedGraph(sweep.graph, point.budget_bytes, point.margin_bytes, point.solution, sweep.provenance)
