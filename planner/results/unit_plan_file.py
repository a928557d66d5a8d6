"""A plan of units as JSON: a graph file (planner/results/plan_file.py) of the outer code, with the section "units".

Its fields: `schema`, `kinds` (one a line: {"name", "fingerprint", "graph", "schedules", "provenance"}), `units` (per unit its
kind and schedule), `calls` (per unit, the two ops of the outer graph that stand for each of its calls), `is_measured`,
`budget_bytes`, `plain_bytes`, `measured_bytes`, `bound_ns`, `left`. Predicted peaks and times are not stored: `simulate` gives
them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import GraphError, PlanFileError, ScheduleError
from planner.graph.fields import boolean, integer, reason, rows, string, table
from planner.graph.graph import Graph
from planner.graph.outer import OuterGraph, UnitCall
from planner.graph.planned_units import PlannedKind, PlannedUnitGraphs
from planner.graph.schedule import Schedule
from planner.graph.structure import fingerprint
from planner.report import files
from planner.results import plan_file
from planner.units import MOST_BYTES

SCHEMA = 1
"""Of the section "units"; the graphs are of the schema of plan files."""

P = TypeVar("P", bound=PlannedUnitGraphs)


def save(plan: PlannedUnitGraphs, path: str | Path) -> None:
    """Write a plan of units.

    Raises:
        InputError: the file cannot be written.
    """
    files.write(path, dumps(plan))


def dumps(plan: PlannedUnitGraphs) -> str:
    """The file's text."""
    fields = {
        "schema": SCHEMA,
        "kinds": plan_file.Lines(_kind_fields(kind) for kind in plan.kinds),
        "units": {unit: list(positions) for unit, positions in plan.units.items()},
        "calls": {unit: [i for call, at in plan.outer.calls.items() if call.unit == unit for i in at] for unit in plan.units},
        "is_measured": plan.outer.is_measured,
        "budget_bytes": plan.budget_bytes,
        "plain_bytes": plan.plain_bytes,
        "measured_bytes": plan.measured_bytes,
        "bound_ns": plan.bound_ns,
        "left": dict(plan.left),
    }
    return plan_file.dumps(plan.outer.graph, sections={"units": fields})


def _kind_fields(kind: PlannedKind) -> dict[str, Any]:
    return {
        "name": kind.name,
        "fingerprint": fingerprint(kind.graph),
        "graph": plan_file.graph_fields(kind.graph),
        "schedules": [schedule.steps for schedule in kind.schedules],
        "provenance": plan_file.provenance_fields(kind.provenance),
    }


def load(path: str | os.PathLike[str], kind: type[P]) -> P:
    """Read a plan of units as one of this class.

    Raises:
        PlanFileError: unreadable, not JSON, another schema, or graphs or schedules that do not check.
    """
    return loads(plan_file.read_text(path, "plan file"), kind, str(path))


def loads(text: str, kind: type[P], where: str = "plan") -> P:
    """Read a plan from the text of a file; `where` names it in errors."""
    document = plan_file.read_document(text, where)
    if "units" not in document:
        held = "Plan.load reads it" if "plan" in document else "it holds a graph alone"
        raise PlanFileError(f"{where} holds no plan of units: {held}")
    graph = plan_file.read_graph(document, where)
    try:
        fields = table(document["units"], "the section units")
        schema = integer(fields["schema"], "the schema of the section units")
        if schema != SCHEMA:
            raise ValueError(f"the section units has schema {schema}; this release reads schema {SCHEMA}")
        kinds = tuple(_kind(table(row, "a kind"), where) for row in rows(fields["kinds"], "kinds"))
        calls = dict(chain.from_iterable(_calls(*row, len(graph.ops)) for row in table(fields["calls"], "calls").items()))
        units = {unit: _pair(row, f"the plan of {unit}", MOST_BYTES) for unit, row in table(fields["units"], "units").items()}
        if units.keys() != {call.unit for call in calls} or any(
            k >= len(kinds) or at >= len(kinds[k].schedules) for k, at in units.values()
        ):
            raise ValueError("its units, their ops and their kinds do not go together")
        plan = kind(
            kinds,
            units,
            OuterGraph(graph, calls, boolean(fields["is_measured"], "is_measured")),
            budget_bytes=integer(fields["budget_bytes"], "budget_bytes", 0, MOST_BYTES),
            plain_bytes=_bytes(fields["plain_bytes"], "plain_bytes"),
            measured_bytes=_bytes(fields["measured_bytes"], "measured_bytes"),
            bound_ns=integer(fields["bound_ns"], "bound_ns", 0, MOST_BYTES),
            left={name: string(why, f"why {name} is left") for name, why in table(fields["left"], "left").items()},
        )
        plan.peak_bytes  # noqa: B018 (composes and simulates)
    except KeyError as error:
        raise PlanFileError(f"{where} holds no valid plan of units: the field {reason(error)} is missing") from error
    except (ValueError, GraphError, ScheduleError) as error:
        raise PlanFileError(f"{where} holds no valid plan of units: {reason(error)}") from error
    return plan


def _bytes(value: Any, what: str) -> int | None:
    return None if value is None else integer(value, what, 0, MOST_BYTES)


def _calls(unit: str, row: Any, end: int) -> Iterator[tuple[UnitCall, tuple[int, int]]]:
    """The ops of a unit's calls: forward, backward, forward, backward, ..."""
    what = f"the ops of {unit}"
    fields = rows(row, what)
    if not fields or len(fields) % 2:
        raise ValueError(f"{what} are {len(fields)}, not two for each call")
    for number, k in enumerate(range(0, len(fields), 2)):
        yield UnitCall(unit, number), _pair(fields[k : k + 2], what, end)


def _pair(row: Any, what: str, end: int) -> tuple[int, int]:
    fields = rows(row, what)
    if len(fields) != 2:
        raise ValueError(f"{what} has {len(fields)} fields, not 2")
    return integer(fields[0], what, 0, end - 1), integer(fields[1], what, 0, end - 1)


def _kind(fields: dict[str, Any], where: str) -> PlannedKind:
    name = string(fields["name"], "the name of a kind")
    document = {"schema": plan_file.SCHEMA, "graph": fields["graph"], "fingerprint": fields["fingerprint"]}
    graph: Graph = plan_file.read_graph(document, f"{where}, units of class {name},")
    last = len(graph.ops) - 1
    schedules = tuple(
        Schedule(tuple(integer(i, "a step", 0, last) for i in rows(steps, "steps")))
        for steps in rows(fields["schedules"], "schedules")
    )
    return PlannedKind(name, graph, schedules, plan_file.read_provenance(fields["provenance"]))
