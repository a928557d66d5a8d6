"""Plans and explanations as figures for machines, without graphs and schedules: what `--json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planner.analysis.estimate import Estimated
from planner.analysis.explain import Explained
from planner.graph.planned import PlannedGraph
from planner.results.plan_file import provenance_fields

JSON_SCHEMA = 3
"""Version of what `--json` prints (docs/json.md): of all commands, files that are read again have their own. A field that is
renamed, removed or means something else raises it; a new field does not."""


def head(kind: str) -> dict[str, Any]:
    """How every result begins: the version of the schema, and which result it is."""
    return {"schema": JSON_SCHEMA, "kind": kind}


def plan_figures(plan: PlannedGraph) -> dict[str, Any]:
    """What a plan promises: bytes with everything resident, nanoseconds, shares of the plain step's time."""
    timeline, plain = plan.timeline, plan.plain
    return {
        **head("plan"),
        "budget_bytes": plan.budget_bytes,
        "margin_bytes": plan.margin_bytes,
        "plain": {"peak_bytes": plain.peak_bytes, "time_ns": plain.time_ns},
        "peak_bytes": timeline.peak_bytes,
        "measured_bytes": plan.measured_bytes,
        "check": plan.check,
        "time_ns": timeline.time_ns,
        "bound_ns": plan.solution.bound_ns,
        "overhead": plan.overhead,
        "gap": plan.gap,
        "status": plan.solution.status,
        "solver": plan.solution.solver,
        "solve_s": plan.solution.solve_s,
        "work": plan.solution.work,
        "limit": plan.solution.limit,
        "num_ops": len(plan.graph.ops),
        "num_recomputes": len(plan.solution.schedule.recomputes()),
        "provenance": provenance_fields(plan.provenance),
    }


def explanation_figures(explained: Explained) -> dict[str, Any]:
    """The plan's figures, with a row for each module or group of modules, and the prices of a little more and less memory."""
    prices = {"more": explained.more, "less": explained.less}
    return {
        **plan_figures(explained.plan),
        **head("explanation"),
        "modules": [asdict(row) | {"why": row.why} for row in explained.rows],
        "prices": {name: None if price is None else asdict(price) for name, price in prices.items()},
    }


def estimate_figures(estimate: Estimated) -> dict[str, Any]:
    """What an estimate says: bytes with everything resident."""
    plan = estimate.plan
    return {
        **head("estimate"),
        "device": estimate.device,
        "memory_bytes": estimate.memory_bytes,
        "fits": estimate.fits,
        "fits_planned": estimate.fits_planned,
        "missing_bytes": estimate.missing_bytes,
        "peak_bytes": estimate.peak_bytes,
        "margin_bytes": estimate.margin_bytes,
        "needed_bytes": estimate.needed_bytes,
        "peak_at": estimate.peak_at,
        "parts": asdict(estimate.parts),
        "floor_bytes": estimate.floor_bytes,
        "floor_at": estimate.floor_at,
        "lowest_bytes": estimate.lowest_bytes,
        "plan": None if plan is None else plan_figures(plan),
        "why_no_plan": estimate.why_no_plan,
        "modules": [asdict(row) for row in estimate.modules],
        "remedies": [asdict(each) for each in estimate.remedies],
        "provenance": provenance_fields(estimate.provenance),
    }
