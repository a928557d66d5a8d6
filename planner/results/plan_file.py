"""Graph and Plan as JSON: sorted keys, one op a line, a schema version and a fingerprint. Described in docs/plan-file.md."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from planner.arguments import check_path
from planner.errors import GraphError, PlanFileError, ScheduleError
from planner.graph.fields import (
    MOST_NUMBER,
    boolean,
    choice,
    integer,
    number,
    parse,
    read_all,
    reason,
    rows,
    string,
    strings,
    table,
)
from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value
from planner.graph.planned import PlannedGraph
from planner.graph.provenance import COSTS, Provenance
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.graph.solution import LIMITS, STATUSES, Solution
from planner.graph.source import source_from_json, source_to_json
from planner.graph.structure import fingerprint
from planner.report import files
from planner.results import schema1
from planner.units import MOST_BYTES, shown

SCHEMA = 2
"""The version that is written. Files of version 1 are read too (`planner.results.schema1`)."""
_MOST_KERNELS = 10**9


P = TypeVar("P", bound=PlannedGraph)


class Lines(list[Any]):
    """A list that is written one item a line, so that a diff shows which one changed."""


def dumps(graph: Graph, plan: PlannedGraph | None = None, *, sections: Mapping[str, Any] | None = None) -> str:
    """The file's text. With `plan`, its schedule and how it was found travel too; `sections`: other rooms' fields, by name."""
    document: dict[str, Any] = {"schema": SCHEMA, "fingerprint": fingerprint(graph), "graph": graph_fields(graph)}
    if plan is not None:
        document["plan"] = {
            "budget_bytes": plan.budget_bytes,
            "margin_bytes": plan.margin_bytes,
            "provenance": provenance_fields(plan.provenance),
            "check": plan.check,
            "measured_bytes": plan.measured_bytes,
            **solution_fields(plan.solution),
            "steps": plan.solution.schedule,
        }
    return _write(document | dict(sections or {}))


def save(plan: PlannedGraph, path: str | Path) -> None:
    """Write a plan and its graph.

    Raises:
        InputError: the file cannot be written.
    """
    files.write(path, dumps(plan.graph, plan))


def load(path: str | os.PathLike[str], kind: type[P]) -> P:
    """Read a plan as one of this class.

    Raises:
        PlanFileError: unreadable, not JSON, another schema, or a graph or schedule that does not check.
    """
    return loads(read_text(path, "plan file"), kind, str(path))


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A file's text; a name in .gz is unpacked. `what`: what it is, for errors.

    Raises:
        PlanFileError: unreadable, or larger than any plan.
    """
    check_path(path)
    try:
        with open(path, "rb") as file:
            if Path(path).suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return read_all(unpacked).decode("utf-8")  # type: ignore[arg-type]
            return read_all(file).decode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError, MemoryError) as error:
        raise PlanFileError(f"cannot read {what} {path}: {reason(error)}") from error


def loads(text: str, kind: type[P], where: str = "plan") -> P:
    """Read a plan from the text of a file; `where` names it in errors."""
    document = read_document(text, where)
    graph = read_graph(document, where)
    try:
        fields = table(document.get("plan"), "the section plan")
        solution = read_solution(fields, graph)
        measured = fields["measured_bytes"]
        plan = kind(
            graph=graph,
            budget_bytes=integer(fields["budget_bytes"], "budget_bytes", 0, MOST_BYTES),
            margin_bytes=integer(fields["margin_bytes"], "margin_bytes", 0, MOST_BYTES),
            solution=solution,
            provenance=read_provenance(fields["provenance"]),
            measured_bytes=None if measured is None else integer(measured, "measured_bytes", 0, MOST_BYTES),
            check=string(fields["check"], "check"),
        )
        peak = simulate(graph, solution.schedule).peak_bytes
    except (KeyError, ValueError, ScheduleError) as error:
        raise PlanFileError(f"{where} holds no valid plan: {_named(error)}") from error
    if peak > plan.budget_bytes:
        raise PlanFileError(f"{where}: its schedule peaks at {peak} bytes, above its own budget of {plan.budget_bytes}")
    if plan.margin_bytes > plan.budget_bytes:
        raise PlanFileError(f"{where}: its margin of {plan.margin_bytes} bytes is above its budget of {plan.budget_bytes}")
    return plan


def load_graph(path: str | Path) -> Graph:
    """Read the graph of a plan file or of a graph file; a name in .gz is unpacked.

    Raises:
        PlanFileError: as for `load`.
    """
    return read_graph(read_document(read_text(path, "graph file"), str(path)), str(path))


def load_solvable(path: str | Path) -> tuple[Graph, PlannedGraph | None]:
    """Read a graph to plan again, and the plan that the file holds beside it, if any.

    Raises:
        PlanFileError: as for `load`.
    """
    text = read_text(path, "graph file")
    document = read_document(text, str(path))
    plan = loads(text, PlannedGraph, str(path)) if "plan" in document else None
    return (plan.graph, plan) if plan is not None else (read_graph(document, str(path)), None)


def _named(error: Exception) -> str:
    """What is wrong with a file: a missing field, or a wrong one."""
    return f"the field {reason(error)} is missing" if isinstance(error, KeyError) else reason(error)


def graph_fields(graph: Graph) -> dict[str, Any]:
    """A graph's fields."""
    return {
        "values": Lines(map(_value_row, graph.values)),
        "ops": Lines(_op_row(op) for op in graph.ops),
        "forward_outputs": graph.forward_outputs,
        "backward_outputs": graph.backward_outputs,
        "num_forward_ops": graph.num_forward_ops,
        "backward_is_fixed": graph.backward_is_fixed,
        "in_flight": graph.in_flight,
    }


def _value_row(value: Value) -> list[Any]:
    """Without the last fields that say nothing."""
    row = [value.name, value.nbytes, value.kind.value, value.hidden_bytes, value.form]
    return row if value.form else row[:4] if value.hidden_bytes else row[:3]


def _op_row(op: Op) -> list[Any]:
    measured, source = [op.cost_ns, op.workspace_bytes], source_to_json(op.source)
    return [op.name, op.nodes, op.reads, op.writes, *measured, op.recomputable, source, op.kernel, op.arguments]


def solution_fields(solution: Solution) -> dict[str, Any]:
    """A solution's fields, without the schedule's steps."""
    return {
        "status": solution.status,
        "bound_ns": solution.bound_ns,
        "solve_s": solution.solve_s,
        "solver": solution.solver,
        "work": solution.work,
        "limit": solution.limit,
    }


def provenance_fields(provenance: Provenance | None) -> dict[str, Any] | None:
    """A provenance's fields; None where nothing is known."""
    return None if provenance is None else asdict(provenance)


def _write(document: dict[str, Any]) -> str:
    """JSON with sorted keys: a section's fields stand one a line, `Lines` one item a line, schedules one run a line."""

    def listed(lines: list[str]) -> str:
        return "[\n" + ",\n".join(f"   {line}" for line in lines) + "\n  ]"

    def written(field: Any) -> str:
        if isinstance(field, Lines):
            return listed([json.dumps(item, sort_keys=True) for item in field])
        if isinstance(field, Schedule):
            return listed([json.dumps(run)[1:-1] for run in _runs(field.steps)])
        return json.dumps(field, sort_keys=True)

    parts = []
    for key, fields in sorted(document.items()):
        if not isinstance(fields, dict):
            parts.append(f" {json.dumps(key)}: {json.dumps(fields)}")
            continue
        lines = [f"  {json.dumps(name)}: {written(field)}" for name, field in sorted(fields.items())]
        parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _runs(steps: Sequence[int]) -> Iterator[list[int]]:
    """The steps cut wherever the captured order is left: a recompute stands on a line of its own."""
    for _, run in groupby(enumerate(steps), key=lambda place: place[1] - place[0]):
        yield [step for _, step in run]


def read_solution(fields: dict[str, Any], graph: Graph) -> Solution:
    """A solution for a graph, out of a file's fields.

    Raises:
        KeyError, ValueError: a field is missing or of another kind.
    """
    last = len(graph.ops) - 1
    return Solution(
        status=choice(fields["status"], "status", STATUSES),
        schedule=Schedule(tuple(integer(i, "a step", 0, last) for i in rows(fields["steps"], "steps"))),
        bound_ns=integer(fields["bound_ns"], "bound_ns", -MOST_BYTES, MOST_BYTES),
        solve_s=number(fields["solve_s"], "solve_s"),
        solver=string(fields["solver"], "solver"),
        work=number(fields["work"], "work"),
        limit=choice(fields["limit"], "limit", LIMITS),
    )


def read_provenance(value: Any) -> Provenance | None:
    """A provenance out of a file's fields.

    Raises:
        KeyError, ValueError: a field is missing or of another kind.
    """
    if value is None:
        return None
    fields = table(value, "provenance")
    kernels = integer(fields["num_kernels"], "num_kernels", 0, _MOST_KERNELS)
    return Provenance(
        costs=choice(fields["costs"], "costs", COSTS),  # type: ignore[arg-type]
        device=string(fields["device"], "device"),
        is_here=boolean(fields["is_here"], "is_here"),
        model=string(fields["model"], "model"),
        num_kernels=kernels,
        num_estimated=integer(fields["num_estimated"], "num_estimated", 0, kernels),
        spread=number(fields.get("spread", 0.0), "spread"),
        opaque=strings(fields["opaque"], "opaque"),
        repeats=tuple(map(_repeat, rows(fields.get("repeats", []), "repeats"))),
        torch=string(fields["torch"], "torch"),
        date=string(fields["date"], "date"),
        module=string(fields.get("module", ""), "module"),
        loss=strings(fields.get("loss", []), "loss"),
        call=string(fields.get("call", ""), "call"),
    )


def _repeat(row: Any) -> tuple[str, int]:
    fields = rows(row, "a repeat")
    if len(fields) != 2:
        raise ValueError(f"a repeat has {len(fields)} fields, not 2")
    kind, count = fields
    return string(kind, "a repeated block"), integer(count, "its number", 0, _MOST_KERNELS)


def read_document(text: str, where: str) -> dict[str, Any]:
    """A file's sections.

    Raises:
        PlanFileError: not JSON, or of another schema.
    """
    try:
        document = parse(text)
    except (ValueError, MemoryError) as error:
        raise PlanFileError(f"{where} is not JSON: {reason(error)}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise PlanFileError(f"{where} is not a plan file: it names no schema version")
    schema = document["schema"]
    if type(schema) is not int or schema not in (schema1.SCHEMA, SCHEMA):
        named = shown(schema).strip("'")
        if type(schema) is int and schema > SCHEMA:
            raise PlanFileError(
                f"{where} has schema {named}, of a newer release; this one reads schema {SCHEMA}. "
                "Update checkpoint-planner, or make the plan again."
            )
        raise PlanFileError(f"{where} has schema {named}; this release reads schema {SCHEMA}. Make the plan again.")
    try:
        return document if schema == SCHEMA else schema1.upgraded(document)
    except ValueError as error:
        raise PlanFileError(f"{where} is no valid file of schema {schema}: {reason(error)}") from error


def read_graph(document: dict[str, Any], where: str) -> Graph:
    """The graph of a file.

    Raises:
        PlanFileError: it does not check, or does not match its fingerprint.
    """
    try:
        fields = table(document.get("graph"), "the section graph")
        values = tuple(map(_value, rows(fields["values"], "values")))
        ops = tuple(map(_op, rows(fields["ops"], "ops")))
        graph = Graph(
            ops=ops,
            values=values,
            inputs=tuple(value.name for value in values if value.kind in RESIDENT_KINDS),
            forward_outputs=strings(fields["forward_outputs"], "forward_outputs"),
            backward_outputs=strings(fields["backward_outputs"], "backward_outputs"),
            num_forward_ops=integer(fields["num_forward_ops"], "num_forward_ops"),
            backward_is_fixed=boolean(fields["backward_is_fixed"], "backward_is_fixed"),
            in_flight=integer(fields.get("in_flight", 1), "in_flight", 1),
        )
        if sum(value.nbytes for value in values) + sum(max(0, op.workspace_bytes) for op in ops) > MOST_BYTES:
            raise ValueError("its sizes add up to more than 64 bits hold")
        stored = string(document["fingerprint"], "fingerprint")
    except (KeyError, ValueError, GraphError) as error:
        raise PlanFileError(f"{where} holds no valid graph: {_named(error)}") from error
    if (fingerprint if document["schema"] == SCHEMA else schema1.fingerprint)(graph) != stored:
        raise PlanFileError(f"{where} was altered: its graph does not match its fingerprint {shown(stored)}")
    return graph


def _value(row: Any) -> Value:
    fields = rows(row, "a value")
    if not 3 <= len(fields) <= 5:
        raise ValueError(f"a value has {len(fields)} fields, not 3 to 5")
    name = string(fields[0], "the name of a value")
    hidden = integer(fields[3], f"the hidden bytes of {shown(name)}") if len(fields) > 3 else 0
    form = string(fields[4], f"the form of {shown(name)}") if len(fields) > 4 else ""
    nbytes, kind = integer(fields[1], f"the bytes of {shown(name)}"), Kind(string(fields[2], "the kind of a value"))
    return Value(name, nbytes, kind, hidden, form)


def _op(row: Any) -> Op:
    fields = rows(row, "an op")
    if len(fields) != 10:
        raise ValueError(f"an op has {len(fields)} fields, not 10")
    name, nodes, reads, writes, cost_ns, workspace_bytes, recomputable, source, kernel, arguments = fields
    where = f"of op {shown(string(name, 'the name of an op'))}"
    return Op(
        name,
        strings(nodes, f"the nodes {where}"),
        strings(reads, f"the reads {where}"),
        strings(writes, f"the writes {where}"),
        integer(cost_ns, f"the time {where}"),
        integer(workspace_bytes, f"the workspace {where}", -MOST_NUMBER),
        boolean(recomputable, f"whether it is recomputable {where}"),
        source_from_json(source, f"the source {where}"),
        string(kernel, f"the kernel {where}"),
        string(arguments, f"the arguments {where}"),
    )
