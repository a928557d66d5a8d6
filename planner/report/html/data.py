"""What the report shows, as one JSON document: tables of names, and columns of numbers that refer to them by index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.analysis.explain import module_rows
from planner.analysis.references import Reference
from planner.analysis.sweep import InfeasiblePoint, MeasuredPoint
from planner.graph.floor import floor, floor_advice, floor_parts
from planner.graph.graph import Graph, Op
from planner.graph.modules import module_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import keep_all
from planner.report.html.series import Series, series
from planner.report.stack import Stack

_LONGEST = 400
"""Characters of a call that are shown."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a report is made of.

    Attributes:
        plans: of one graph, the smallest budget first.
        chosen: index of the one that is shown first.
        references: schedules that need no solver.
        infeasible: budgets that have no plan.
        measured: planned steps that were run.
    """

    plans: Sequence[PlannedGraph]
    chosen: int
    references: Sequence[Reference] = ()
    infeasible: Sequence[InfeasiblePoint] = ()
    measured: Sequence[MeasuredPoint] = ()


def document(content: Content, most: int) -> dict[str, Any]:
    """The document. `most`: steps of a schedule that are drawn."""
    shown = content.plans[content.chosen]
    graph, names = shown.graph, _Names(shown.graph)
    stack = Stack(graph, (keep_all(graph), *(plan.solution.schedule for plan in content.plans)))
    plain = series(graph, keep_all(graph), stack, most)
    drawn = [series(graph, plan.solution.schedule, stack, most) for plan in content.plans]
    return {
        "layers": [{"label": layer.label, "color": layer.color, "hatched": layer.is_hatched} for layer in stack.layers],
        "plain": _series_fields(plain, names),
        "plans": [_plan_fields(plan, each, plain, names) for plan, each in zip(content.plans, drawn, strict=True)],
        "chosen": content.chosen,
        "references": [asdict(reference) for reference in content.references],
        "infeasible": [asdict(point) for point in content.infeasible],
        "measured": _measured(content),
        "floor": _floor_fields(graph),
        "num_ops": len(graph.ops),
        "provenance": None if shown.provenance is None else asdict(shown.provenance),
        "modules": names.modules,
        "tensors": names.tensors,
        "ops": names.ops,
    }


class _Names:
    """Tables of the modules, tensors and ops that the columns refer to.

    Attributes:
        modules: paths.
        tensors: rows [name, form, op]; op -1 for what comes from outside.
        ops: rows [name, call, module, place].
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.modules: list[str] = []
        self.tensors: list[tuple[str, str, int]] = []
        self.ops: list[tuple[str, str, int, str]] = []
        self._module: dict[str, int] = {}
        self._tensor: dict[str, int] = {}
        self._op: dict[int, int] = {}

    def module(self, path: str) -> int:
        """The row of a module."""
        if path not in self._module:
            self._module[path] = len(self.modules)
            self.modules.append(path)
        return self._module[path]

    def op(self, i: int) -> int:
        """The row of an op; -1 for -1."""
        if i >= 0 and i not in self._op:
            op = self.graph.ops[i]
            self._op[i] = len(self.ops)
            self.ops.append((op.name, _call(op), self.module(module_of(op)), op.source.place))
        return self._op.get(i, -1)

    def tensor(self, name: str, i: int) -> int:
        """The row of a tensor that op `i` wrote, or of its workspace."""
        if name not in self._tensor:
            self._tensor[name] = len(self.tensors)
            value = self.graph.value.get(name)
            self.tensors.append((name, value.form if value is not None else "", self.op(i)))
        return self._tensor[name]


def _call(op: Op) -> str:
    """The kernel and what it is called with: dtypes and shapes, with the names of what it reads."""
    named = re.sub(r"%(\d+)", lambda found: dict(enumerate(op.reads)).get(int(found[1]), found[0]), op.arguments)
    text = f"{op.kernel}({named})" if op.kernel else op.name
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _plan_fields(plan: PlannedGraph, drawn: Series, plain: Series, names: _Names) -> dict[str, Any]:
    rows = module_rows(plan.graph, plan.solution.schedule, drawn.timeline.saved, plain.timeline.saved)
    time_ns, plain_ns = drawn.timeline.time_ns, max(1, plain.timeline.time_ns)
    return {
        "budget_bytes": plan.budget_bytes,
        "margin_bytes": plan.margin_bytes,
        "bound_ns": plan.solution.bound_ns,
        "status": plan.solution.status,
        "overhead": time_ns / plain_ns - 1,
        "gap": max(0, time_ns - plan.solution.bound_ns) / plain_ns,
        "check": plan.check,
        "solver": plan.solution.solver,
        "solve_s": plan.solution.solve_s,
        "stopped": plan.solution.limit == "time",
        "by_module": {
            "module": [names.module(path) for path in rows],
            **{
                name: [getattr(row, name) for row in rows.values()]
                for name in ("kept_bytes", "freed_bytes", "recomputed_bytes", "recomputed_ns", "worth_ns")
            },
        },
        **_series_fields(drawn, names),
    }


def _series_fields(drawn: Series, names: _Names) -> dict[str, Any]:
    timeline, again = drawn.timeline, set(drawn.schedule.recomputes())
    return {
        "peak_bytes": timeline.peak_bytes,
        "time_ns": timeline.time_ns,
        "num_steps": len(drawn.schedule.steps),
        "num_recomputes": len(again),
        "boundary": next((k for k, t in enumerate(drawn.steps) if t >= timeline.boundary), len(drawn.steps)),
        "peak": drawn.steps.index(timeline.peak_step) if drawn.steps else 0,
        "start_ns": drawn.start_ns,
        "op": [names.op(drawn.schedule.steps[t]) for t in drawn.steps],
        "again": [int(t in again) for t in drawn.steps],
        "held": {
            "layer": [held.layer for held in drawn.held],
            "module": [names.module(held.module) for held in drawn.held],
            "first": [held.first for held in drawn.held],
            "last": [held.last for held in drawn.held],
            "bytes": [held.nbytes for held in drawn.held],
            "count": [held.count for held in drawn.held],
            "tensor": [names.tensor(held.name, held.op) for held in drawn.held],
        },
    }


def _floor_fields(graph: Graph) -> dict[str, Any]:
    nbytes, i = floor(graph)
    op = graph.ops[i] if i >= 0 else None
    return {
        "bytes": nbytes,
        "op": "" if op is None else f"{op.name} ({op.source})" if op.source else op.name,
        "parts": floor_parts(graph),
        "advice": floor_advice(graph),
    }


def _measured(content: Content) -> list[dict[str, Any]]:
    """What was measured beside what was predicted, by budget."""
    predicted = {plan.budget_bytes: plan for plan in content.plans}
    rows = []
    for found in content.measured:
        plan = predicted.get(found.budget_bytes)
        if plan is not None:
            rows.append(asdict(found) | {"predicted_bytes": plan.peak_bytes, "predicted_ratio": 1 + plan.overhead})
    known = {row["budget_bytes"] for row in rows}
    for plan in content.plans:
        if plan.measured_bytes is not None and plan.budget_bytes not in known:
            alone = MeasuredPoint(plan.budget_bytes, plan.measured_bytes, None, True)
            rows.append(asdict(alone) | {"predicted_bytes": plan.peak_bytes, "predicted_ratio": 1 + plan.overhead})
    return sorted(rows, key=lambda row: row["budget_bytes"])
