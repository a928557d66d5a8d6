"""An estimate as text."""

from __future__ import annotations

from rich.table import Table

from planner.analysis.estimate import OPTIMIZER, Estimated
from planner.analysis.explain import ModuleRow
from planner.graph.accumulation import HELD, values_set_aside
from planner.graph.graph import Kind, purpose_of
from planner.report.plan_table import ASSUMING
from planner.report.tables import Block, facts, number, render, table, words
from planner.units import enough_text, format_bytes, format_ns

MODULE_ROWS = 6

_ARGUMENTS = {
    "optimizer state": "optimizer=...",
    "float32 weights": "master_weights=True",
    "reserved": "reserve=...",
    purpose_of(HELD): "accumulate=True",
}
"""Arguments of `plan` by what they set bytes aside for."""


def text(estimate: Estimated) -> str:
    """What `print(estimate)` shows."""
    memory = estimate.memory_bytes
    rows = [
        ("verdict", verdict(estimate)),
        ("device", estimate.device + ("" if memory is None else f", {format_bytes(memory)} for the step")),
        (
            "peak",
            f"{format_bytes(estimate.peak_bytes)} predicted for the plain step, at most {format_bytes(estimate.needed_bytes)} "
            f"with a margin of {format_bytes(estimate.margin_bytes)}",
        ),
        ("peak at", estimate.peak_at),
        ("floor", _floor(estimate)),
        ("planned", _planned(estimate)),
        ("no plan", estimate.why_no_plan),
        ("costs", str(estimate.provenance)),
    ]
    parts: list[Block] = [facts(rows), "", _parts(estimate)]
    if estimate.modules:
        parts += ["", _modules(estimate)]
    if estimate.remedies:
        parts += ["", _remedies(estimate)]
    return render(*parts)


def verdict(estimate: Estimated) -> str:
    """Fits or not, how much is missing, and what to do first."""
    memory, plan = estimate.memory_bytes, estimate.plan
    if memory is None:
        return "the device's memory is not known: give memory='24GiB'"
    if estimate.fits:
        return f"fits: {format_bytes(memory - estimate.needed_bytes)} of {format_bytes(memory)} stay free"
    missing = f"does not fit: {enough_text(estimate.missing_bytes)} are missing"
    if plan is not None:
        purposes = [purpose_of(value.name) for value in estimate.graph.values if value.kind is Kind.RESERVED]
        asked = "".join(f", {_ARGUMENTS[purpose]}" for purpose in purposes if purpose in _ARGUMENTS)
        return f"{missing}; fits planned, {plan.overhead:+.1%} time: plan(model, {memory}, args{asked})"
    if estimate.floor_bytes + estimate.margin_bytes > memory:
        free = f", and {format_bytes(estimate.margin_bytes)} stay free for the allocator" if estimate.margin_bytes else ""
        return f"{missing}, and no plan can help: every schedule needs {enough_text(estimate.floor_bytes)}{free}"
    return f"{missing}, and no plan was found"


def _floor(estimate: Estimated) -> str:
    at = f" (op {estimate.floor_at})" if estimate.floor_at else ""
    proven = f"no plan can peak below {format_bytes(estimate.floor_bytes)}{at}"
    return f"{proven}; the lowest found peaks at {format_bytes(estimate.lowest_bytes)}"


def _planned(estimate: Estimated) -> str:
    plan = estimate.plan
    if plan is None:
        return ""
    return (
        f"peak {format_bytes(plan.peak_bytes)}, {format_ns(plan.plain.time_ns)} plain -> {format_ns(plan.timeline.time_ns)} "
        f"(+{plan.overhead:.2%}); at most {plan.gap:.2%} from the best plan ({ASSUMING})"
    )


def _parts(estimate: Estimated) -> Table:
    parts = estimate.parts
    others = [purpose_of(value.name) for value in values_set_aside(estimate.graph) if value.name not in OPTIMIZER]
    rows = (
        ("parameters", parts.parameters_bytes),
        ("buffers", parts.buffers_bytes),
        ("inputs and outputs", parts.inputs_bytes),
        ("gradients", parts.gradients_bytes),
        ("optimizer", parts.optimizer_bytes),
        (", ".join(others), parts.reserved_bytes),
        ("activations", parts.activations_bytes),
        ("temporaries", parts.temporaries_bytes),
    )
    whole = max(1, estimate.peak_bytes)
    shown = [(name, format_bytes(nbytes), f"{nbytes / whole:.1%}") for name, nbytes in rows if nbytes]
    return table([words("at the peak"), number("bytes"), number("share")], shown)


def _modules(estimate: Estimated) -> Table:
    plain_ns = max(1, estimate.graph.plain_ns)
    ranked = sorted(estimate.modules, key=lambda row: (row.rank == 0, row.rank))
    columns = [words("best to recompute first"), number("kept"), number("time again"), number("of the step")]
    return table(columns, [_module(row, plain_ns) for row in ranked if row.rank][:MODULE_ROWS])


def _module(row: ModuleRow, plain_ns: int) -> tuple[str, ...]:
    label = f"{row.label} ({row.count}x)" if row.count > 1 else row.label
    return label, format_bytes(row.kept_bytes), format_ns(row.worth_ns), f"{row.worth_ns / plain_ns:.1%}"


def _remedies(estimate: Estimated) -> Table:
    rows = [(each.what, format_bytes(each.saved_bytes), each.cost) for each in estimate.remedies]
    return table([words("what else would help"), number("peak lower by"), words("")], rows)
