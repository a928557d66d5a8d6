"""A plan as text: what it promises, what each part takes, what is kept and recomputed where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from rich.table import Table

from planner.graph.graph import Graph, Kind, purpose_of
from planner.graph.modules import kinds_of, module_of
from planner.graph.planned import PlannedGraph
from planner.graph.simulate import Timeline
from planner.report.tables import facts, number, render, table, words
from planner.units import format_bytes, format_ns

MODULE_ROWS = 12
MOST_OUTPUTS = 4
ASSUMING = "for this backward order at these costs"
STOPPED = "by the limit of wall-clock time: another run may give another plan"


def text(plan: PlannedGraph) -> str:
    """The table that `print(plan)` shows."""
    timeline, plain = plan.timeline, plan.plain
    known = "; estimated, not measured" if plan.is_estimated else ""
    saved = 1 - timeline.peak_bytes / max(1, plain.peak_bytes)
    rows = [
        ("budget", f"{format_bytes(plan.budget_bytes)} (of which {format_bytes(plan.margin_bytes)} are left to the allocator)"),
        (
            "peak",
            f"{format_bytes(plain.peak_bytes)} plain -> {format_bytes(timeline.peak_bytes)} predicted ({saved:.1%} less), "
            f"{_measured(plan)}",
        ),
        ("peak at", _where(plan)),
        ("for", plan.provenance.call if plan.provenance else ""),
        ("backward", _starts(plan)),
        (
            "step time",
            f"{format_ns(plain.time_ns)} plain -> {format_ns(timeline.time_ns)} planned (+{plan.overhead:.2%}){known}",
        ),
        ("optimality", f"at most {plan.gap:.2%} of the step from the best plan ({plan.solution.status}; {ASSUMING})"),
        ("solved", f"in {plan.solution.solve_s:.2f} s{_work(plan)} by {plan.solution.solver}; {len(plan.graph.ops)} ops"),
        ("stopped", STOPPED if plan.solution.limit == "time" else ""),
        ("costs", str(plan.provenance or "")),
    ]
    return render(facts(rows), "", _parts(plan.graph, timeline), "", _modules(plan, timeline))


def _work(plan: PlannedGraph) -> str:
    return f", {plan.solution.work:.1f} units of work," if plan.solution.work else ""


def _measured(plan: PlannedGraph) -> str:
    """The measured peak; or that there is none, and why."""
    if plan.measured_bytes is not None:
        over = plan.measured_bytes > plan.budget_bytes
        why = ": costs='estimate' leaves out what kernels need for themselves" if plan.is_estimated else ""
        return f"{format_bytes(plan.measured_bytes)} measured{f', MORE than the budget{why}' if over else ''}"
    _, _, reason = plan.check.partition(": ")
    return f"not measured{reason and f' ({reason})'}"


def _starts(plan: PlannedGraph) -> str:
    """The outputs that backward starts from; "" where there is only one output, or they are not known."""
    names = plan.provenance.loss if plan.provenance else ()
    if len(names) == 1:
        return "" if names == ("the output",) else f"from the output {names[0]}"
    more = f", {len(names) - MOST_OUTPUTS} more" if len(names) > MOST_OUTPUTS else ""
    return f"from the outputs {', '.join(names[:MOST_OUTPUTS])}{more} (loss=... chooses one)" if names else ""


def _where(plan: PlannedGraph) -> str:
    if not plan.graph.ops:
        return "no op"
    return plan.graph.ops[plan.solution.schedule.steps[plan.timeline.peak_step]].text


_GIVEN = {Kind.TANGENT: "output gradients"}
"""Rows of the table of resident bytes that are not called after their kind."""


def _parts(graph: Graph, timeline: Timeline) -> Table:
    """Bytes by kind: what is resident, what the backward returns, what is saved for it."""
    resident: Counter[str] = Counter()
    given = [graph.value[name] for name in graph.inputs]
    for value in sorted(given, key=lambda value: value.kind):
        name = _GIVEN.get(value.kind, f"{value.kind}s")
        resident[purpose_of(value.name) if value.kind is Kind.RESERVED else name] += value.nbytes
    kept = set(graph.forward_outputs)
    rows = [(name, nbytes) for name, nbytes in resident.items() if nbytes]
    rows += [
        ("outputs", _total(graph, graph.forward_outputs)),
        ("gradients", _total(graph, graph.backward_outputs)),
        ("saved for backward", _total(graph, (name for name in timeline.saved if name not in kept))),
    ]
    return table([words("memory"), number("bytes")], [(name, format_bytes(nbytes)) for name, nbytes in rows])


def _total(graph: Graph, names: Iterable[str]) -> int:
    return sum(graph.value[name].nbytes for name in names)


def _modules(plan: PlannedGraph, timeline: Timeline) -> Table:
    """Kept and recomputed bytes per module; numbered siblings (layers.0, layers.1, ...) share a row."""
    graph, saved = plan.graph, set(timeline.saved) - set(plan.graph.forward_outputs)
    again = Counter(plan.solution.schedule.steps[t] for t in plan.solution.schedule.recomputes())
    kept_bytes: defaultdict[str, int] = defaultdict(int)
    again_bytes: defaultdict[str, int] = defaultdict(int)
    again_ns: defaultdict[str, int] = defaultdict(int)
    numbers: defaultdict[str, set[str]] = defaultdict(set)
    kinds = kinds_of(map(module_of, graph.ops))
    for i, op in enumerate(graph.ops[: graph.num_forward_ops]):
        path = module_of(op)
        row = kinds[path]
        numbers[row].add(path)
        kept_bytes[row] += _total(graph, (name for name in op.writes if name in saved))
        if again[i]:
            again_bytes[row] += again[i] * _total(graph, op.writes)
            again_ns[row] += again[i] * op.cost_ns
    shown = sorted(
        (row for row in numbers if kept_bytes[row] or again_ns[row]), key=lambda row: -kept_bytes[row] - again_bytes[row]
    )
    rows = [_row(_label(row, numbers[row]), kept_bytes[row], again_bytes[row], again_ns[row]) for row in shown[:MODULE_ROWS]]
    if len(shown) > MODULE_ROWS:
        rest = shown[MODULE_ROWS:]
        totals = [sum(column[row] for row in rest) for column in (kept_bytes, again_bytes, again_ns)]
        rows.append(_row(f"({len(rest)} more)", totals[0], totals[1], totals[2]))
    return table([words("module"), number("kept"), number("recomputed"), number("time again")], rows)


def _row(label: str, kept_bytes: int, again_bytes: int, again_ns: int) -> tuple[str, ...]:
    return label, format_bytes(kept_bytes), format_bytes(again_bytes), format_ns(again_ns)


def _label(row: str, paths: set[str]) -> str:
    return f"{row} ({len(paths)}x)" if len(paths) > 1 else next(iter(paths))
