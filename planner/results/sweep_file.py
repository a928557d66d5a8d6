"""A Sweep as JSON: a graph file (planner/results/plan_file.py, same schema version) with one more section.

Layout of "sweep": `points` (one a line: {"budget_bytes", "margin_bytes", "steps"} and the fields of a solution: "status",
"bound_ns", "solve_s", "solver", "work", "limit"), `misses` (rows [budget_bytes, error, reason]), `floor_bytes`, `floor_op`,
`solve_s`, `provenance`, `measured` (rows [budget_bytes, peak_bytes, time_ratio or null, exact, lowest and highest ratio of a
pair or null for both]; files of earlier versions lack the last two). Peaks and times are not stored: `simulate` gives them.
`planner solve` reads the file as a graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.analysis.references import references
from planner.analysis.sweep import InfeasiblePoint, MeasuredPoint, Point, SweptGraph, make_point
from planner.errors import PlanFileError, ScheduleError
from planner.graph.fields import boolean, integer, number, reason, rows, string, table
from planner.graph.graph import Graph
from planner.report import files
from planner.results import plan_file
from planner.results.figures import head
from planner.units import MOST_BYTES


def save(sweep: SweptGraph, path: str | Path) -> None:
    """Write a sweep and its graph.

    Raises:
        InputError: the file cannot be written.
    """
    files.write(path, dumps(sweep))


def dumps(sweep: SweptGraph) -> str:
    """The file's text."""
    fields = {
        "floor_bytes": sweep.floor_bytes,
        "floor_op": sweep.floor_op,
        "provenance": plan_file.provenance_fields(sweep.provenance),
        "measured": [_measured_row(found) for found in sweep.measured],
        "misses": [[point.budget_bytes, point.error, point.reason] for point in sweep.infeasible],
        "points": plan_file.Lines(_point_fields(point) for point in sweep.points),
        "solve_s": sweep.solve_s,
    }
    return plan_file.dumps(sweep.graph, sections={"sweep": fields})


def is_sweep(path: str | Path) -> bool:
    """Whether a file looks like one that `save` wrote; False where it cannot be read."""
    try:
        document = plan_file.read_document(plan_file.read_text(path, "file"), str(path))
    except PlanFileError:
        return False
    return isinstance(document, dict) and "sweep" in document


def load(path: str | Path) -> SweptGraph:
    """Read a sweep.

    Raises:
        PlanFileError: unreadable, not JSON, a newer schema, or a graph or schedule that does not check.
    """
    document = plan_file.read_document(plan_file.read_text(path, "sweep file"), str(path))
    graph = plan_file.read_graph(document, str(path))
    try:
        fields = table(document.get("sweep"), "the section sweep")
        sweep = SweptGraph(
            graph=graph,
            points=tuple(_point(graph, table(entry, "a point")) for entry in rows(fields["points"], "points")),
            infeasible=tuple(_infeasible(row) for row in rows(fields["misses"], "misses")),
            floor_bytes=integer(fields["floor_bytes"], "floor_bytes", 0, MOST_BYTES),
            floor_op=string(fields["floor_op"], "floor_op"),
            solve_s=number(fields["solve_s"], "solve_s"),
            provenance=plan_file.read_provenance(fields["provenance"]),
            measured=tuple(_measured(row) for row in rows(fields["measured"], "measured")),
        )
    except KeyError as error:
        raise PlanFileError(f"{path} holds no valid sweep: the field {reason(error)} is missing") from error
    except (ValueError, ScheduleError) as error:
        raise PlanFileError(f"{path} holds no valid sweep: {reason(error)}") from error
    if not sweep.points:
        raise PlanFileError(f"{path} holds a sweep without points")
    return sweep


def _infeasible(row: Any) -> InfeasiblePoint:
    budget_bytes, error, why = _columns(row, 3, "an infeasible point")
    nbytes = integer(budget_bytes, "the budget of an infeasible point", 0, MOST_BYTES)
    return InfeasiblePoint(nbytes, string(error, "an error"), string(why, "a reason"))


def _measured_row(found: MeasuredPoint) -> list[Any]:
    return [found.budget_bytes, found.peak_bytes, found.time_ratio, found.exact, *(found.time_spread or (None, None))]


def _measured(row: Any) -> MeasuredPoint:
    given = rows(row, "a measurement")
    budget_bytes, peak_bytes, ratio, exact, low, high = _columns(
        given if len(given) != 4 else [*given, None, None], 6, "a measurement"
    )
    return MeasuredPoint(
        integer(budget_bytes, "a measured budget", 0, MOST_BYTES),
        integer(peak_bytes, "a measured peak", 0, MOST_BYTES),
        None if ratio is None else number(ratio, "a measured time"),
        boolean(exact, "whether it was exact"),
        None if low is None else (number(low, "the lowest measured time"), number(high, "the highest measured time")),
    )


def _columns(row: Any, count: int, what: str) -> list[Any]:
    fields = rows(row, what)
    if len(fields) != count:
        raise ValueError(f"{what} has {len(fields)} fields, not {count}")
    return fields


def _point_fields(point: Point) -> dict[str, Any]:
    return {
        "budget_bytes": point.budget_bytes,
        "margin_bytes": point.margin_bytes,
        "steps": point.solution.schedule.steps,
        **plan_file.solution_fields(point.solution),
    }


def _point(graph: Graph, fields: dict[str, Any]) -> Point:
    solution = plan_file.read_solution(fields, graph)
    budget_bytes = integer(fields["budget_bytes"], "budget_bytes", 0, MOST_BYTES)
    point = make_point(graph, budget_bytes, integer(fields["margin_bytes"], "margin_bytes", 0, budget_bytes), solution)
    if point.peak_bytes > point.budget_bytes:
        raise ValueError(f"a schedule peaks at {point.peak_bytes} bytes, above its budget of {point.budget_bytes}")
    return point


def summary(sweep: SweptGraph) -> dict[str, Any]:
    """The figures of a sweep, without graph and schedules: what `planner sweep --json` prints."""
    plain, knee = sweep.plain, sweep.knee_point
    return {
        **head("sweep"),
        "plain": {"peak_bytes": plain.peak_bytes, "time_ns": plain.time_ns},
        "floor": {"bytes": sweep.floor_bytes, "op": sweep.floor_op},
        "knee": {"budget_bytes": knee.budget_bytes, "peak_bytes": knee.peak_bytes, "overhead": knee.overhead},
        "points": [
            {
                "budget_bytes": point.budget_bytes,
                "peak_bytes": point.peak_bytes,
                "time_ns": point.time_ns,
                "bound_ns": point.bound_ns,
                "overhead": point.overhead,
                "status": point.status,
                "work": point.solution.work,
                "limit": point.solution.limit,
            }
            for point in sweep.points
        ],
        "misses": [{"budget_bytes": point.budget_bytes, "error": point.error} for point in sweep.infeasible],
        "measured": [
            {
                "budget_bytes": found.budget_bytes,
                "peak_bytes": found.peak_bytes,
                "time_ratio": found.time_ratio,
                "exact": found.exact,
                "time_spread": found.time_spread,
            }
            for found in sweep.measured
        ],
        "without_solver": [
            {"name": reference.name, "peak_bytes": reference.peak_bytes, "time_ns": reference.time_ns}
            for reference in references(sweep.graph)
        ],
        "solve_s": sweep.solve_s,
        "provenance": plan_file.provenance_fields(sweep.provenance),
    }
