"""A sweep as text: what each budget costs, how far from the optimum it can be, what changes from one to the next."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from planner.analysis.references import Reference
from planner.analysis.sweep import Point, SweptGraph
from planner.graph.simulate import simulate
from planner.report.plan_table import ASSUMING, STOPPED
from planner.report.tables import Block, facts, number, render, table, words
from planner.units import format_bytes, format_ns


def text(sweep: SweptGraph, references: Iterable[Reference]) -> str:
    """What `print(sweep)` shows."""
    caption = f"gap: at most so far from the best, {ASSUMING}"
    parts: list[Block] = [facts(_head(sweep)), "", _points(sweep), caption, "", _changes(sweep)]
    if sweep.graph.num_forward_ops:
        parts += ["", "without a solver:", _references(sweep, references)]
    return render(*parts)


def suggestion(sweep: SweptGraph) -> str:
    """The knee, in words: "356 MiB (50.0% of plain), +3.0% time"."""
    knee = sweep.knee_point
    share = knee.peak_bytes / max(1, sweep.plain.peak_bytes)
    return f"{format_bytes(knee.peak_bytes)} ({share:.1%} of plain), {knee.overhead:+.1%} time"


def _head(sweep: SweptGraph) -> list[tuple[str, str]]:
    plain, held = sweep.plain, f"; held by {sweep.floor_op}" if sweep.floor_op else ""
    stopped = sum(point.solution.limit == "time" for point in sweep.points)
    return [
        ("plain step", f"{format_bytes(plain.peak_bytes)}, {format_ns(plain.time_ns)}"),
        ("floor", f"{format_bytes(sweep.floor_bytes)}, below which no schedule peaks{held}"),
        ("suggested", f"{suggestion(sweep)}: the knee, below it less memory costs ever more time"),
        ("solved", f"{len(sweep.points) + len(sweep.infeasible)} budgets in {sweep.solve_s:.2f} s; {len(sweep.graph.ops)} ops"),
        ("stopped", f"{stopped} of {len(sweep.points)} plans {STOPPED}" if stopped else ""),
        ("costs", str(sweep.provenance or "")),
        *(("no plan", f"{_budget(sweep, point.budget_bytes)}: {point.error}") for point in sweep.infeasible),
    ]


def _budget(sweep: SweptGraph, budget_bytes: int) -> str:
    return f"{format_bytes(budget_bytes)} ({budget_bytes / max(1, sweep.plain.peak_bytes):.1%} of plain)"


def _points(sweep: SweptGraph) -> Table:
    """One row a budget, smallest first: what it costs."""
    columns = ("budget", "of\nplain", "peak", "step time", "overhead", "gap", "status", "")
    rows = [
        (
            format_bytes(point.budget_bytes),
            f"{point.budget_bytes / max(1, sweep.plain.peak_bytes):.1%}",
            format_bytes(point.peak_bytes),
            format_ns(point.time_ns),
            f"{point.overhead:.2%}",
            f"{point.gap:.2%}",
            point.status,
            "<- knee" if point is sweep.knee_point else "",
        )
        for point in sweep.points
    ]
    return table(map(number, columns), rows)


def _changes(sweep: SweptGraph) -> Table:
    """One row a budget: what is kept and recomputed, and what was measured.

    `kept` says what changes from the row above, in values alive between forward and backward: a plan whose row has no
    minus is nested in it. Where one has, keeping something larger made room elsewhere.
    """
    columns = ["budget", "kept values", "recomputes", *(["measured peak", "measured time"] if sweep.measured else [])]
    rows, before = [], None
    for point in sweep.points:
        saved = set(simulate(sweep.graph, point.solution.schedule).saved)
        change = f"{len(saved)}" if before is None else f"+{len(saved - before)} -{len(before - saved)}"
        before = saved
        num_recomputes = len(point.solution.schedule.recomputes())
        rows.append((format_bytes(point.budget_bytes), change, str(num_recomputes), *_measured(sweep, point)))
    return table(map(number, columns), rows)


def _measured(sweep: SweptGraph, point: Point) -> tuple[str, ...]:
    """The measured peak, and the measured step time as a multiple of the plain step's."""
    found = next((found for found in sweep.measured if found.budget_bytes == point.budget_bytes), None)
    if found is None:
        return ()
    ratio = "" if found.time_ratio is None else f"{found.time_ratio:.3f}x plain"
    return f"{format_bytes(found.peak_bytes)}{'' if found.exact else ' DIFFERENT'}", ratio


def _references(sweep: SweptGraph, references: Iterable[Reference]) -> Table:
    """Schedules that need no solver, beside the cheapest point that needs no more memory."""
    columns = [words(""), *map(number, ("peak", "overhead", "this sweep at that peak"))]
    rows = []
    for reference in references:
        best = sweep.within(reference.peak_bytes)
        ours = "no point so low" if best is None else f"{best.overhead:.2%} ({format_bytes(best.peak_bytes)})"
        overhead = reference.time_ns / max(1, sweep.plain.time_ns) - 1
        rows.append((reference.name, format_bytes(reference.peak_bytes), f"{overhead:.2%}", ours))
    return table(columns, rows)
