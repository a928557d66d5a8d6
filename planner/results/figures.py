"""Plans and explanations as figures for machines, without graphs and schedules: what `--json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planner.analysis.explain import Explained
from planner.graph.planned import PlannedGraph
from planner.results.plan_file import SCHEMA, provenance_fields


def plan_figures(plan: PlannedGraph) -> dict[str, Any]:
    """What a plan promises: bytes with everything resident, nanoseconds, shares of the plain step's time."""
    timeline, plain = plan.timeline, plan.plain
    return {
        "schema": SCHEMA,
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
        "modules": [asdict(row) | {"why": row.why} for row in explained.rows],
        "prices": {name: None if price is None else asdict(price) for name, price in prices.items()},
    }
