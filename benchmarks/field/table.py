"""The Markdown table of a run: counts, what is not exact and why, and a row for each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.field.case import PRECISIONS
from benchmarks.field.outcome import OUTCOMES, Outcome
from planner.units import format_bytes

MOST_REASON = 300


def exact_share(outcomes: Iterable[Outcome], kinds: Sequence[str] = ("exact", "unplanned")) -> float:
    """Share of all training steps that ran planned and bit-equal within the budget; a row of no such kind has none."""
    outcomes = [o for o in outcomes if o.outcome != "broken"]
    steps = sum(o.planned_steps / (o.steps or 1) for o in outcomes if o.outcome in kinds)
    return steps / len(outcomes) if outcomes else 0.0


def table(outcomes: Iterable[Outcome], date: str, command: str) -> str:
    """Everything that the run says, as Markdown."""
    outcomes = list(outcomes)
    by_case: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_case.setdefault(outcome.case, {})[outcome.precision] = outcome
    packages = {name.partition("/")[0] for name in by_case}
    versions = sorted({o.torch for o in outcomes if o.torch})
    counts = Counter(outcome.outcome for outcome in outcomes)
    lines = [
        f"# Models of public packages, {date}",
        "",
        f"`{command}`, torch {', '.join(versions)}. {len(by_case)} models of {len(packages)} packages, {len(outcomes)} rows "
        f"(fp32 and bf16 autocast): {', '.join(f'{counts[kind]} {kind}' for kind in OUTCOMES if counts[kind])}. "
        f"{exact_share(outcomes):.1%} of all steps ran planned, bit-equal, within the budget; "
        f"{exact_share(outcomes, ('exact', 'unplanned', 'in units')):.1%} with `plan_units` where the whole model is refused.",
        "",
        "Three AdamW steps in training mode with new data each, planned and plain from the same seeds: outputs, gradients, "
        "parameters, buffers, attributes, and the states of torch's, Python's and numpy's generators compared bit for bit. "
        "The budget is 0.7 of the plain peak, or the lowest there is. Bytes: plain -> measured (budget).",
        "",
        *_not_exact(outcomes),
        "## All",
        "",
        f"| model | version | {' | '.join(PRECISIONS)} |",
        f"| --- | --- | {'--- | ' * len(PRECISIONS)}".rstrip(),
    ]
    for name, row in by_case.items():
        version = next((o.version for o in row.values() if o.version), "")
        lines.append(f"| {name} | {version} | {' | '.join(_cell(row.get(p)) for p in PRECISIONS)} |")
    return "\n".join(lines) + "\n"


def _not_exact(outcomes: list[Outcome]) -> list[str]:
    rows = sorted((o for o in outcomes if o.outcome != "exact"), key=lambda o: -OUTCOMES.index(o.outcome))
    if not rows:
        return []
    lines = ["## Not exact", "", "| model | precision | outcome | why |", "| --- | --- | --- | --- |"]
    for row in rows:
        reason = row.reason.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.case} | {row.precision} | {row.outcome} | {reason[:MOST_REASON]} |")
    return [*lines, ""]


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.outcome == "unplanned":
        return f"unplanned ({outcome.planned_steps} of {outcome.steps} steps planned)"
    if outcome.outcome not in ("exact", "in units"):
        return outcome.outcome
    how = f"{outcome.units} units" if outcome.units else "exact"
    opaque = f"; as it is: {outcome.opaque[:60]}" if outcome.opaque else ""
    if not outcome.peak_bytes:
        return f"{how}, peak not measured{opaque}"
    plain, peak, budget = (format_bytes(n) for n in (outcome.plain_bytes, outcome.peak_bytes, outcome.budget_bytes))
    overhead = "" if outcome.units else f", +{100 * outcome.overhead:.1f} %"
    return f"{how}, {plain} -> {peak} ({budget}){overhead}{opaque}"
