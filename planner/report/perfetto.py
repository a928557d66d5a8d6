"""A plan as a trace in the Trace Event Format: opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.

Two processes, the plain and the planned step, each with one thread. Its slices are nested: the phase (forward, backward, and
in the backward recompute), the modules from the outside in, the op. A slice is a pair of events, "B" where it begins and "E"
where it ends; `ts` is in microseconds, as the format has it, with three decimals: to the nanosecond. Counters ("C") have their
unit in their name: all live bytes, live bytes by kind (a series each), and the budget. Metadata ("M") names processes and
threads.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.graph.graph import Graph, Op
from planner.graph.live import live_parts
from planner.graph.modules import place_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import Schedule, keep_all
from planner.report.files import write as write_file

Event = dict[str, Any]
_THREAD = 1
TOTAL, BY_KIND, BUDGET = "live [bytes]", "live by kind [bytes]", "budget [bytes]"
"""Names of the counters."""


def write(plan: PlannedGraph, path: str | Path) -> None:
    """Write the plain and the planned step as a trace.

    Raises:
        InputError: the file cannot be written.
    """
    write_file(path, dumps(plan))


def dumps(plan: PlannedGraph) -> str:
    """The trace's text, one event a line."""
    steps = (("plain step", keep_all(plan.graph)), ("planned step", plan.solution.schedule))
    events = [event for number, (name, schedule) in enumerate(steps, 1) for event in _process(plan, number, name, schedule)]
    lines = ",\n".join(json.dumps(event, sort_keys=True) for event in events)
    return '{"displayTimeUnit": "ms", "traceEvents": [\n' + lines + "\n]}\n"


def _process(plan: PlannedGraph, number: int, name: str, schedule: Schedule) -> Iterator[Event]:
    common = {"pid": number, "tid": _THREAD}
    yield {"ph": "M", "name": "process_name", "args": {"name": name}, **common}
    yield {"ph": "M", "name": "process_sort_index", "args": {"sort_index": number}, **common}
    yield {"ph": "M", "name": "thread_name", "args": {"name": "phases, modules, ops"}, **common}
    events = (*_counters(plan, schedule), *_slices(plan.graph, schedule))
    for start_ns, event in sorted(events, key=lambda event: event[0]):  # stable: a slice ends before the next one begins
        yield {"ts": start_ns / 1000, **event, **common}


def _slices(graph: Graph, schedule: Schedule) -> Iterator[tuple[int, Event]]:
    """The events of the slices, in the order in which they happen."""
    phases, opened, now_ns = _phases(graph, schedule), list[Event](), 0
    for t, i in enumerate(schedule.steps):
        op = graph.ops[i]
        path = [*phases[t], *_modules(op.source.module)]
        shared = next((k for k, (one, other) in enumerate(zip(opened, path, strict=False)) if one != other), len(path))
        yield from ((now_ns, {"ph": "E"}) for _ in opened[shared:])
        yield from ((now_ns, {"ph": "B", **entry}) for entry in path[min(shared, len(opened)) :])
        yield now_ns, {"ph": "B", "name": op.name, "cat": "op", "args": _details(op, t)}
        opened, now_ns = path, now_ns + op.cost_ns
        yield now_ns, {"ph": "E"}
    yield from ((now_ns, {"ph": "E"}) for _ in opened)


def _phases(graph: Graph, schedule: Schedule) -> list[list[Event]]:
    """Per step, the phases it lies in, the outermost first."""
    boundary, again = schedule.boundary(graph), set(schedule.recomputes())
    named = [
        ["forward" if t < boundary else "backward", *(["recompute"] if t in again else [])] for t in range(len(schedule.steps))
    ]
    return [[{"name": name, "cat": "phase"} for name in names] for names in named]


def _modules(path: str) -> list[Event]:
    """A module's path from the outside in; a number belongs to the list that it numbers: "h.0" and "mlp" of "h.0.mlp"."""
    parts: list[str] = []
    for part in path.split(".") if path else []:
        if part.isdecimal() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return [{"name": part, "cat": "module"} for part in parts]


def _details(op: Op, step: int) -> Event:
    found: Event = {"from": place_of(op), "source": asdict(op.source), "step": step, "writes": list(op.writes)}
    return found | ({"kernel": op.kernel, "arguments": op.arguments} if op.kernel else {})


def _counters(plan: PlannedGraph, schedule: Schedule) -> Iterator[tuple[int, Event]]:
    """All counters at the start of each step, and at the end of the last."""
    graph = plan.graph
    parts = {part.value: nbytes.tolist() for part, nbytes in live_parts(graph, schedule).items() if nbytes.any()}
    now_ns = 0
    for t, i in enumerate(schedule.steps):
        live = {part: nbytes[t] for part, nbytes in parts.items()}
        yield from _count(now_ns, live, plan.budget_bytes)
        now_ns += graph.ops[i].cost_ns
    yield from _count(now_ns, dict.fromkeys(parts, 0), plan.budget_bytes)


def _count(now_ns: int, live: dict[str, int], budget_bytes: int) -> Iterator[tuple[int, Event]]:
    for name, series in ((TOTAL, {"total": sum(live.values())}), (BY_KIND, live), (BUDGET, {"budget": budget_bytes})):
        yield now_ns, {"ph": "C", "name": name, "args": series}
