"""Graph and Plan as JSON: sorted keys, one op a line, a schema version and a fingerprint. Described in docs/plan-file.md."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from planner.errors import GraphError, InputError, PlanFileError, ScheduleError
from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value
from planner.graph.plan import NOT_RUN, Plan, Solution
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate

SCHEMA = 1


def fingerprint(graph: Graph) -> str:
    """Hex digest of the graph's structure: names, bytes, reads and writes, but nothing that is measured, and no sources."""
    rows: list[Any] = [[v.name, v.nbytes - v.hidden_bytes, v.kind.value] for v in graph.values if v.kind is not Kind.RESERVED]
    rows += [[op.name, op.nodes, op.reads, op.writes, op.recomputable] for op in graph.ops]
    rows += [graph.forward_outputs, graph.backward_outputs, graph.num_forward_ops]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def dumps(graph: Graph, plan: Plan | None = None, *, sections: Mapping[str, Any] | None = None) -> str:
    """The file's text. With `plan`, its schedule and how it was found travel too; `sections`: other rooms' fields, by name."""
    document: dict[str, Any] = {"schema": SCHEMA, "fingerprint": fingerprint(graph), "graph": _graph_fields(graph)}
    if plan is not None:
        document["plan"] = {
            "budget_bytes": plan.budget_bytes,
            "margin_bytes": plan.margin_bytes,
            "made_on": dict(plan.made_on),
            "status": plan.solution.status,
            "bound_ns": plan.solution.bound_ns,
            "solve_s": plan.solution.solve_s,
            "solver": plan.solution.solver,
            "steps": plan.solution.schedule.steps,
            "check": plan.check,
            **({} if plan.measured_bytes is None else {"measured_bytes": plan.measured_bytes}),
        }
    return _write(document | dict(sections or {}))


def save(plan: Plan, path: str | Path) -> None:
    """Write a plan and its graph.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(path).write_text(dumps(plan.graph, plan), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write plan file {path}: {error}") from error


def load(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        PlanFileError: unreadable, not JSON, another schema, or a graph or schedule that does not check.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(f"cannot read plan file {path}: {error}") from error
    return loads(text, str(path))


def loads(text: str, where: str = "plan") -> Plan:
    """Read a plan from the text of a file; `where` names it in errors."""
    document = _read(text, where)
    graph = _graph(document, where)
    try:
        fields = document["plan"]
        solution = read_solution(fields)
        plan = Plan(
            graph=graph,
            budget_bytes=int(fields["budget_bytes"]),
            margin_bytes=int(fields["margin_bytes"]),
            solution=solution,
            made_on=tuple(sorted((str(k), str(v)) for k, v in fields["made_on"].items())),
            measured_bytes=_optional_bytes(fields, "measured_bytes"),
            check=str(fields.get("check", NOT_RUN)),
        )
        peak = simulate(graph, solution.schedule).peak_bytes
    except (KeyError, TypeError, ValueError, AttributeError, ScheduleError) as error:
        raise PlanFileError(f"{where} holds no valid plan: {type(error).__name__}: {error}") from error
    if peak > plan.budget_bytes:
        raise PlanFileError(f"{where}: its schedule peaks at {peak} bytes, above its own budget of {plan.budget_bytes}")
    return plan


def _optional_bytes(fields: Mapping[str, Any], name: str) -> int | None:
    """A number of bytes that files of earlier releases do not have.

    Raises:
        ValueError: it is no number of bytes.
    """
    found = fields.get(name)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
        raise ValueError(f"{name} is {str(found)[:40]!r}")
    return found


def load_graph(path: str | Path) -> Graph:
    """Read the graph of a plan file or of a graph file; a name in .gz is unpacked.

    Raises:
        PlanFileError: as for `load`.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if Path(path).suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise PlanFileError(f"cannot read graph file {path}: {error}") from error
    return _graph(_read(text, str(path)), str(path))


def _graph_fields(graph: Graph) -> dict[str, Any]:
    return {
        "values": [[v.name, v.nbytes, v.kind.value, *([v.hidden_bytes] if v.hidden_bytes else ())] for v in graph.values],
        "ops": [
            [op.name, op.nodes, op.reads, op.writes, op.cost_ns, op.workspace_bytes, op.recomputable, op.source]
            for op in graph.ops
        ],
        "forward_outputs": graph.forward_outputs,
        "backward_outputs": graph.backward_outputs,
        "num_forward_ops": graph.num_forward_ops,
    }


def _write(document: dict[str, Any]) -> str:
    """JSON in which the long lists stand one row a line, so that a diff shows which op changed."""

    def rows(lines: list[str]) -> str:
        return "[\n" + ",\n".join(f"   {line}" for line in lines) + "\n  ]"

    def written(name: str, field: Any) -> str:
        if name in ("ops", "points", "values"):
            return rows([json.dumps(item) for item in field])
        if name == "steps":
            return rows([json.dumps(run)[1:-1] for run in _runs(field)])
        return json.dumps(field, sort_keys=True)

    parts = []
    for key, fields in sorted(document.items()):
        if not isinstance(fields, dict):
            parts.append(f" {json.dumps(key)}: {json.dumps(fields)}")
            continue
        lines = [f"  {json.dumps(name)}: {written(name, field)}" for name, field in sorted(fields.items())]
        parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _runs(steps: Sequence[int]) -> Iterator[list[int]]:
    """The steps cut wherever the captured order is left: a recompute stands on a line of its own."""
    for _, run in groupby(enumerate(steps), key=lambda place: place[1] - place[0]):
        yield [step for _, step in run]


def read_solution(fields: dict[str, Any]) -> Solution:
    """A solution out of a file's fields.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of another kind.
    """
    return Solution(
        status=str(fields["status"]),
        schedule=Schedule(tuple(int(i) for i in fields["steps"])),
        bound_ns=int(fields["bound_ns"]),
        solve_s=float(fields["solve_s"]),
        solver=str(fields["solver"]),
    )


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanFileError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise PlanFileError(f"{where} is not a plan file: it names no schema version")
    schema = document["schema"]
    if isinstance(schema, int) and schema > SCHEMA:
        raise PlanFileError(
            f"{where} has schema {schema}, of a newer release; this one reads schema {SCHEMA}. "
            "Update checkpoint-planner, or make the plan again."
        )
    if schema != SCHEMA:
        raise PlanFileError(f"{where} has schema {schema}; this release reads schema {SCHEMA}. Make the plan again.")
    return document


def _graph(document: dict[str, Any], where: str) -> Graph:
    try:
        fields = document["graph"]
        rows = fields["values"]
        values = tuple(Value(str(name), int(nbytes), Kind(kind), *map(int, more)) for name, nbytes, kind, *more in rows)
        ops = tuple(
            Op(str(name), tuple(nodes), tuple(reads), tuple(writes), int(cost), int(workspace), bool(again), str(source))
            for name, nodes, reads, writes, cost, workspace, again, source in fields["ops"]
        )
        graph = Graph(
            ops=ops,
            values=values,
            inputs=tuple(value.name for value in values if value.kind in RESIDENT_KINDS),
            forward_outputs=tuple(fields["forward_outputs"]),
            backward_outputs=tuple(fields["backward_outputs"]),
            num_forward_ops=int(fields["num_forward_ops"]),
        )
        stored = document["fingerprint"]
    except (KeyError, TypeError, ValueError, GraphError) as error:
        raise PlanFileError(f"{where} holds no valid graph: {type(error).__name__}: {error}") from error
    if fingerprint(graph) != stored:
        raise PlanFileError(f"{where} was altered: its graph does not match its fingerprint {stored}")
    return graph
