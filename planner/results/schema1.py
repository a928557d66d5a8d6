"""Files of schema 1, which earlier development versions wrote: read as what they say, and never written.

Their ops name no kernels, so a plan from one is shown, explained and solved again, but not applied to a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from planner.graph.fields import pairs, rows, table
from planner.graph.graph import Graph, Kind

SCHEMA = 1
_PARTLY = re.compile(r"measured, (\d{1,9}) of (\d{1,9}) kernels estimated")
_ABSENT = " (not here)"


def fingerprint(graph: Graph) -> str:
    """What schema 1 calls a graph's fingerprint: of names too."""
    content: list[Any] = [
        [v.name, v.nbytes - v.hidden_bytes, v.kind.value] for v in graph.values if v.kind is not Kind.RESERVED
    ]
    content += [[op.name, op.nodes, op.reads, op.writes, op.recomputable] for op in graph.ops]
    content += [graph.forward_outputs, graph.backward_outputs, graph.num_forward_ops]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the fields of the present schema; its `schema` and `fingerprint` stay.

    Raises:
        ValueError: a field is of another kind.
    """
    made = dict(document)
    graph = table(document.get("graph"), "the section graph")
    if "ops" in graph:
        made["graph"] = graph | {"ops": [_op(row) for row in rows(graph["ops"], "ops")], "backward_is_fixed": False}
    if "plan" in document:
        made["plan"] = {"check": "not run", "measured_bytes": None} | _solved(table(document["plan"], "the section plan"))
    if "sweep" in document:
        sweep = _with_provenance(table(document["sweep"], "the section sweep"))
        if "points" in sweep:
            sweep["points"] = [_solved(table(point, "a point")) for point in rows(sweep["points"], "points")]
        made["sweep"] = sweep
    return made


def _op(row: Any) -> Any:
    """A row with columns for a kernel and its arguments, which are not known."""
    return [*row, "", ""] if isinstance(row, list) and len(row) == 8 else row


def _solved(fields: dict[str, Any]) -> dict[str, Any]:
    return _with_provenance(fields) | {"work": 0.0, "limit": ""}


def _with_provenance(fields: dict[str, Any]) -> dict[str, Any]:
    if "made_on" not in fields:
        return dict(fields)
    said = dict(pairs(fields["made_on"], "made_on"))
    return {name: field for name, field in fields.items() if name != "made_on"} | {"provenance": _provenance(said)}


def _provenance(said: dict[str, str]) -> dict[str, Any] | None:
    """Fields of a Provenance out of schema 1's texts; None where it says nothing of costs."""
    if "costs" not in said:
        return None
    partly = _PARTLY.fullmatch(said["costs"])
    is_estimated = said["costs"].startswith("estimated")
    device, opaque = said.get("device", ""), said.get("as they are", "")
    return {
        "costs": "estimated" if is_estimated else "measured",
        "device": device.removesuffix(_ABSENT),
        "is_here": not device.endswith(_ABSENT),
        "model": said["costs"].removeprefix("estimated").removeprefix(": ") if is_estimated else "",
        "num_estimated": int(partly[1]) if partly else 0,
        "num_kernels": int(partly[2]) if partly else 0,
        "opaque": opaque.split(", ") if opaque else [],
        "torch": said.get("torch", ""),
        "date": said.get("date", ""),
    }
