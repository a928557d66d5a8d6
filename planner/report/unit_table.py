"""A plan of units as text: what the step takes, and how many units of which kind run how."""

from __future__ import annotations

from collections import Counter

from planner.graph.modules import fold
from planner.graph.planned_units import PlannedUnitGraphs
from planner.report.tables import Block, facts, number, render, table, words
from planner.units import format_bytes, format_ns


def text(plan: PlannedUnitGraphs) -> str:
    """The table that `print(plan)` shows."""
    plain = "did not fit, or was not run" if plan.plain_bytes is None else f"{format_bytes(plan.plain_bytes)} plain, measured"
    measured = "not measured" if plan.measured_bytes is None else f"{format_bytes(plan.measured_bytes)} measured"
    of = "the units' time; outer code was not timed" if plan.outer.is_measured else "the plain step"
    source = "of the whole step, captured" if not plan.outer.is_measured else "from a measured step"
    known = "; estimated, not measured" if plan.provenance is not None and plan.provenance.is_estimated else ""
    rows = [
        ("budget", format_bytes(plan.budget_bytes)),
        ("peak", f"{plain} -> {format_bytes(plan.peak_bytes)} predicted, {measured}"),
        ("recompute", f"{format_ns(plan.recompute_ns)}, +{plan.overhead:.2%} of {of}{known}"),
        ("optimality", f"at most {plan.gap:.2%} from the best choice of the points that were found for the units"),
        ("outer code", f"{source}; it keeps all"),
        *([("gradients", "accumulated over several steps: those of earlier ones are counted")] if plan.accumulates else []),
        ("costs", str(plan.provenance or "")),
    ]
    return render(facts(rows), "", _kinds(plan), *_left(plan))


def _kinds(plan: PlannedUnitGraphs) -> Block:
    members: dict[tuple[int, int], list[str]] = {}
    for unit, treated in plan.units.items():
        members.setdefault(treated, []).append(unit)
    counts = Counter(kind for kind, _ in plan.units.values())
    rows = []
    for (kind, at), units in sorted(
        members.items(), key=lambda row: (row[0][0], plan.kinds[row[0][0]].points[row[0][1]].time_ns)
    ):
        own = plan.kinds[kind]
        one = own.points[at]
        rows.append(
            (
                f"{own.name} ({counts[kind]}x)",
                f"{len(units)}",
                format_bytes(one.saved_bytes),
                format_bytes(one.beyond_bytes),
                format_ns(one.time_ns),
                ", ".join(fold(dict.fromkeys(units))),
            )
        )
    head = [words("kind"), number("units"), number("saves"), number("needs beyond"), number("recomputes"), words("which")]
    return table(head, rows)


def _left(plan: PlannedUnitGraphs) -> list[Block]:
    if not plan.left:
        return []
    return ["", table([words("left as it is"), words("because")], list(plan.left.items()))]
