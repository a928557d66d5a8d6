"""A sweep as text: what each budget costs, how far from the optimum it can be, what changes from one to the next."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from planner.analysis.references import Reference
from planner.analysis.sweep import Miss, Point, SweptGraph
from planner.graph.simulate import simulate
from planner.report.plan_table import ASSUMING, STOPPED
from planner.units import format_bytes, format_ns

_WIDTH = 160


def text(sweep: SweptGraph, references: Iterable[Reference]) -> str:
    """What `print(sweep)` shows."""
    console = Console(width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        for line in _head(sweep):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(_points(sweep))
        if sweep.graph.num_forward_ops:
            console.print(_references(sweep, references))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def suggestion(sweep: SweptGraph) -> str:
    """The knee, in words: "356 MiB (50.0% of plain), +3.0% time"."""
    knee = sweep.knee_point
    share = knee.peak_bytes / max(1, sweep.plain.peak_bytes)
    return f"{format_bytes(knee.peak_bytes)} ({share:.1%} of plain), {knee.overhead:+.1%} time"


def _head(sweep: SweptGraph) -> list[str]:
    plain, held = sweep.plain, f"; held by {sweep.floor_op}" if sweep.floor_op else ""
    stopped = sum(point.solution.limit == "time" for point in sweep.points)
    rows = [
        ("plain step", f"{format_bytes(plain.peak_bytes)}, {format_ns(plain.time_ns)}"),
        ("floor", f"{format_bytes(sweep.floor_bytes)}, below which no schedule peaks{held}"),
        ("suggested", f"{suggestion(sweep)}: the knee, below it less memory costs ever more time"),
        ("solved", f"{len(sweep.points) + len(sweep.misses)} budgets in {sweep.solve_s:.2f} s; {len(sweep.graph.ops)} ops"),
        ("stopped", f"{stopped} of {len(sweep.points)} plans {STOPPED}" if stopped else ""),
        ("costs", str(sweep.provenance or "")),
    ]
    return [f"{name:<11} {line}" for name, line in rows if line]


def _points(sweep: SweptGraph) -> Table:
    """One row a budget, smallest first.

    `kept` says what changes from the row above, in values alive between forward and backward: a plan whose row has no
    minus is nested in it. Where one has, keeping something larger made room elsewhere.
    """
    table = Table(box=box.SIMPLE, caption=f"gap: at most so far from the best, {ASSUMING}", caption_justify="left")
    measured = {found.budget_bytes: found for found in sweep.measured}
    columns = ["budget", "of plain", "peak", "step time", "overhead", "gap", "status", "kept", "recomputes"]
    for column in (*columns, *(["measured peak", "measured time"] if measured else []), ""):
        table.add_column(column, justify="right", no_wrap=True)
    before: set[str] | None = None
    entries: list[Miss | Point] = [*sweep.misses, *sweep.points]
    for entry in sorted(entries, key=lambda entry: entry.budget_bytes):
        share = f"{entry.budget_bytes / max(1, sweep.plain.peak_bytes):.1%}"
        if isinstance(entry, Miss):
            table.add_row(format_bytes(entry.budget_bytes), share, entry.error)
            continue
        saved = set(simulate(sweep.graph, entry.solution.schedule).saved)
        change = f"{len(saved)}" if before is None else f"+{len(saved - before)} -{len(before - saved)}"
        before = saved
        table.add_row(format_bytes(entry.budget_bytes), share, *_figures(entry, change), *_seen(sweep, entry))
    return table


def _figures(point: Point, change: str) -> list[str]:
    return [
        format_bytes(point.peak_bytes),
        format_ns(point.time_ns),
        f"{point.overhead:.2%}",
        f"{point.gap:.2%}",
        point.status,
        change,
        str(len(point.solution.schedule.recomputes())),
    ]


def _seen(sweep: SweptGraph, point: Point) -> list[str]:
    """What was measured of a point, and whether it is the knee."""
    cells = []
    if sweep.measured:
        found = next((found for found in sweep.measured if found.budget_bytes == point.budget_bytes), None)
        ratio = "" if found is None or found.time_ratio is None else f"{found.time_ratio:.3f}x"
        wrong = " DIFFERENT" if found is not None and not found.exact else ""
        cells = ["" if found is None else f"{format_bytes(found.peak_bytes)}{wrong}", ratio]
    return [*cells, "<- knee" if point is sweep.knee_point else ""]


def _references(sweep: SweptGraph, references: Iterable[Reference]) -> Table:
    """Schedules that need no solver, beside the cheapest point that needs no more memory."""
    table = Table(box=box.SIMPLE, title="without a solver", title_justify="left", title_style="")
    for column in ("", "peak", "overhead", "this sweep at that peak"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for reference in references:
        fitting = [point for point in sweep.points if point.peak_bytes <= reference.peak_bytes]
        best = min(fitting, key=lambda point: point.time_ns, default=None)
        ours = "no point so low" if best is None else f"{best.overhead:.2%} ({format_bytes(best.peak_bytes)})"
        overhead = reference.time_ns / max(1, sweep.plain.time_ns) - 1
        table.add_row(reference.name, format_bytes(reference.peak_bytes), f"{overhead:.2%}", ours)
    return table
