"""A plan as a trace in the Trace Event Format: opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.

Two processes, the plain and the planned step. Each has a thread of complete events ("X": name, ts and dur in microseconds),
one an op, and counters ("C"): "live" with a series a part (chrome://tracing stacks them, Perfetto shows a track each), and
"total" with their sum. Metadata events ("M") name processes and threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.graph.modules import place_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import Schedule, keep_all
from planner.report.timeline import live_parts

_THREAD = 1


def trace(plan: PlannedGraph, path: str | Path) -> None:
    """Write the plain and the planned step as a trace.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(path).write_text(dumps(plan), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def dumps(plan: PlannedGraph) -> str:
    """The trace's text, one event a line."""
    steps = (("plain step", keep_all(plan.graph)), ("planned step", plan.solution.schedule))
    events = [event for number, (name, schedule) in enumerate(steps, 1) for event in _events(plan, number, name, schedule)]
    lines = ",\n".join(json.dumps(event, sort_keys=True) for event in events)
    return '{"displayTimeUnit": "ms", "traceEvents": [\n' + lines + "\n]}\n"


def _events(plan: PlannedGraph, process: int, name: str, schedule: Schedule) -> Iterator[dict[str, Any]]:
    graph = plan.graph
    common = {"pid": process, "tid": _THREAD}
    yield {"ph": "M", "name": "process_name", "args": {"name": name}, **common}
    yield {"ph": "M", "name": "process_sort_index", "args": {"sort_index": process}, **common}
    yield {"ph": "M", "name": "thread_name", "args": {"name": "ops"}, **common}
    boundary, again = schedule.boundary(graph), set(schedule.recomputes())
    parts = {part.value: nbytes.tolist() for part, nbytes in live_parts(graph, schedule).items() if nbytes.any()}
    start_ns = 0
    for t, i in enumerate(schedule.steps):
        op = graph.ops[i]
        phase = "recompute" if t in again else "forward" if t < boundary else "backward"
        live = {part: nbytes[t] for part, nbytes in parts.items()}
        at = {"ts": start_ns / 1000, **common}
        yield {"ph": "C", "name": "live", "args": live, **at}
        yield {"ph": "C", "name": "total", "args": {"bytes": sum(live.values())}, **at}
        details = {"from": place_of(op), "source": asdict(op.source), "step": t, "writes": list(op.writes)}
        yield {"ph": "X", "name": op.name, "cat": phase, "dur": op.cost_ns / 1000, "args": details, **at}
        start_ns += op.cost_ns
    for counter, series in (("live", dict.fromkeys(parts, 0)), ("total", {"bytes": 0})):
        yield {"ph": "C", "name": counter, "args": series, "ts": start_ns / 1000, **common}
