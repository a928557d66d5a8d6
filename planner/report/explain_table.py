"""An explanation as text."""

from __future__ import annotations

from planner.analysis.explain import Explained
from planner.units import format_bytes, format_ns


def text(explained: Explained) -> str:
    """What `print(plan.explain())` shows."""
    plan, rows = explained.plan, explained.rows
    labels = [f"{row.label} ({row.count}x)" if row.count > 1 else row.label for row in rows]
    width = max(map(len, (*labels, "module")))
    head = f"{'module':<{width}} {'kept':>11} {'recomputed':>11} {'time again':>10} {'freed per ms':>13} {'rank':>5}  why"
    lines = [head, "-" * (len(head) + 20)]
    for label, row in zip(labels, rows, strict=True):
        rate = format_bytes(round(row.rate * 1e6)) if row.rank else "-"
        figures = (
            f"{format_bytes(row.kept_bytes):>11} {format_bytes(row.recomputed_bytes):>11} {format_ns(row.recomputed_ns):>10}"
        )
        lines.append(f"{label:<{width}} {figures} {rate:>13} {row.rank or '-':>5}  {row.why}")
    peaks = f"peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.plain.peak_bytes)} plain"
    title = [
        f"budget {format_bytes(plan.budget_bytes)}, {peaks}, {plan.overhead:+.2%} time",
        "kept, recomputed: activations for the backward, summed over the modules of a row; rank: by bytes freed per ms",
    ]
    return "\n".join([*title, "", *lines, "", *_price_lines(explained)])


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
