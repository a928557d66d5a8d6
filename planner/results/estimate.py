"""The estimate that a user holds: whether a training step fits into a device's memory, and what to do where it does not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from planner.analysis.estimate import Estimated
from planner.report import estimate_table
from planner.results import figures
from planner.results.plan import Plan


@dataclass(frozen=True, slots=True)
class Estimate(Estimated):
    """What a training step needs of a device's memory. Prints as a table; attributes as in `Estimated`, `plan` is a `Plan`."""

    plan: Plan | None

    @staticmethod
    def of(found: Estimated) -> Estimate:
        """The estimate with this data."""
        held = {each.name: getattr(found, each.name) for each in fields(found)}
        made = found.plan
        if made is not None:
            held["plan"] = Plan(made.graph, made.budget_bytes, made.margin_bytes, made.solution, made.provenance)
        return Estimate(**held)

    def __str__(self) -> str:
        return estimate_table.text(self)

    def json(self) -> dict[str, Any]:
        """The figures for machines, without graphs and schedules, as json.dumps takes them (docs/json.md)."""
        return figures.estimate_figures(self)
