"""The plan of a model's units that a user holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from planner import arguments
from planner.graph.planned_units import PlannedUnitGraphs
from planner.report import unit_table
from planner.results import unit_plan_file
from planner.results.plan import Plan


@dataclass(frozen=True)
class UnitPlan(PlannedUnitGraphs):
    """How each unit of a model runs, and what the step takes. Prints as a table; attributes as in `PlannedUnitGraphs`."""

    def __str__(self) -> str:
        return unit_table.text(self)

    @property
    def whole(self) -> Plan:
        """The whole step as one Plan, for its pictures and explanations; recompute is confined to units."""
        made = self.planned
        return Plan(made.graph, made.budget_bytes, 0, made.solution, made.provenance, made.measured_bytes, made.check)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (docs/units.md).

        Raises:
            InputError: the file cannot be written.
        """
        arguments.check_path(path)
        unit_plan_file.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> UnitPlan:
        """Read a plan written by `save`.

        Raises:
            PlanFileError: not JSON, another schema version, or inconsistent.
        """
        arguments.check_path(path)
        return unit_plan_file.load(path, UnitPlan)
