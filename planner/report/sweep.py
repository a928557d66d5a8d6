"""A table of many budgets: what each costs, how far from the optimum it can be, and what changes from one to the next."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from planner.graph.graph import Graph
from planner.graph.plan import Solution
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.table import ASSUMING
from planner.units import format_bytes


def sweep_table(graph: Graph, found: Mapping[int, Solution | Exception]) -> Table:
    """One row a budget, smallest first.

    `kept` says what changes from the row above, in values alive between forward and backward: a plan whose row has no
    minus is nested in it. Where one has, keeping something larger made room elsewhere.
    """
    plain = simulate(graph, keep_all(graph))
    caption = f"gap: at most so far from the best, {ASSUMING}"
    table = Table(title=f"plain step: {format_bytes(plain.peak_bytes)}", caption=caption)
    for column in ("budget", "of plain", "peak", "overhead", "gap", "kept", "recomputes", "s"):
        table.add_column(column, justify="right")
    before: set[str] | None = None
    for budget_bytes in sorted(found):
        solution = found[budget_bytes]
        share = f"{budget_bytes / max(1, plain.peak_bytes):.1%}"
        if not isinstance(solution, Solution):
            table.add_row(format_bytes(budget_bytes), share, type(solution).__name__)
            continue
        timeline = simulate(graph, solution.schedule)
        saved = set(timeline.saved)
        change = f"{len(saved)}" if before is None else f"+{len(saved - before)} -{len(before - saved)}"
        gap = max(0, timeline.time_ns - solution.bound_ns) / max(1, plain.time_ns)
        table.add_row(
            format_bytes(budget_bytes),
            share,
            format_bytes(timeline.peak_bytes),
            f"{timeline.time_ns / max(1, plain.time_ns) - 1:.2%}",
            f"{gap:.2%}",
            change,
            str(len(solution.schedule.recomputes())),
            f"{solution.solve_s:.2f}",
        )
        before = saved
    return table
