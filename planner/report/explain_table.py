"""An explanation as text."""

from __future__ import annotations

from planner.analysis.explain import Explained, ModuleRow
from planner.report.tables import number, render, table, words
from planner.units import format_bytes, format_ns


def text(explained: Explained) -> str:
    """What `print(plan.explain())` shows."""
    plan, rows = explained.plan, explained.rows
    columns = [words("module"), *map(number, ("kept", "recomputed", "time again", "freed\nper ms", "rank"))]
    columns.append(words("why", at_least=len("frees this much")))
    peaks = f"peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.plain.peak_bytes)} plain"
    title = [
        f"budget {format_bytes(plan.budget_bytes)}, {peaks}, {plan.overhead:+.2%} time",
        "kept, recomputed: activations for the backward, summed over the modules of a row; rank: by bytes freed per ms",
    ]
    return render(*title, "", table(columns, map(_row, rows), gap=1), "", *_price_lines(explained))


def _row(row: ModuleRow) -> tuple[str, ...]:
    return (
        f"{row.label} ({row.count}x)" if row.count > 1 else row.label,
        format_bytes(row.kept_bytes),
        format_bytes(row.recomputed_bytes),
        format_ns(row.recomputed_ns),
        format_bytes(round(row.rate * 1e6)) if row.rank else "-",
        str(row.rank or "-"),
        row.why,
    )


def _price_lines(explained: Explained) -> list[str]:
    plan, more, less = explained.plan, explained.more, explained.less
    if less is None:
        return []
    plain_ns = max(1, plan.plain.time_ns)
    lines = ["more memory buys nothing: the plain step fits"]
    if more is not None:
        size, saved = format_bytes(more.budget_bytes - plan.budget_bytes), more.saved_ns
        gain = more.reason if saved is None else f"would save {format_ns(saved)} ({saved / plain_ns:.2%} of the plain step)"
        lines = [f"the next {size} {gain}"]
    size = format_bytes(min(plan.budget_bytes, plan.plain.peak_bytes) - less.budget_bytes)
    if less.saved_ns is None:
        return [*lines, f"the last {size} cannot be spared: {less.reason}"]
    return [*lines, f"the last {size} saved {format_ns(-less.saved_ns)} ({-less.saved_ns / plain_ns:.2%} of the plain step)"]
