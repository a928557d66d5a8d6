"""What a training step needs of a device's memory, what a plan for that memory would cost, and what else would help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from planner.analysis.budgets import restated
from planner.analysis.explain import ModuleRow, rows_of
from planner.analysis.sweep import proven_floor
from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.accumulation import values_set_aside
from planner.graph.floor import has_one_sample
from planner.graph.graph import Graph, Kind, reserved_name
from planner.graph.live import MemoryKind, Span, spans
from planner.graph.planned import PlannedGraph
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.solve import Solver
from planner.units import format_bytes

OPTIMIZER = frozenset(map(reserved_name, ("optimizer state", "float32 weights")))
"""Reserved values that are counted as the optimizer's."""


Margin = Callable[[int], int]
"""By a peak in bytes: by how much a measured peak may exceed it; never falls as the peak grows."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes that are live at the peak of a step, by what they are for; the fields but the last add up to the peak.

    They are those of the pictures (`planner.graph.live.MemoryKind`).

    Attributes:
        parameters_bytes, buffers_bytes: resident for the whole step.
        inputs_bytes: the call's tensors, the forward's results, and the gradients of results that come in.
        gradients_bytes: of parameters and inputs, those written by then; and those of earlier micro-steps.
        optimizer_bytes: the optimizer's state, and float32 copies of weights.
        reserved_bytes: set aside by the user, and for libraries.
        activations_bytes: what the forward wrote and is alive when it ends, without its results; of other forwards in
            flight, too.
        temporaries_bytes: what the forward drops again, gradients of activations, and the workspace of the kernel that runs.
        workspace_bytes: of these temporaries, what the kernel that runs takes for itself.
    """

    parameters_bytes: int
    buffers_bytes: int
    inputs_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reserved_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(getattr(self, each.name) for each in fields(self)) - self.workspace_bytes


@dataclass(frozen=True, slots=True)
class PlainStep:
    """The step that is trained without a plan.

    Attributes:
        peak_bytes: its peak, everything resident included.
        parts: what is live there.
        peak_at: the kernel that runs there, with its module or line.
    """

    peak_bytes: int
    parts: Parts
    peak_at: str


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something that would lower the peak of the plain step.

    Attributes:
        what: to do.
        saved_bytes: by how much the peak is lower then.
        cost: what it takes, in words; "" where that is not known.
    """

    what: str
    saved_bytes: int
    cost: str = ""


@dataclass(frozen=True, slots=True)
class Estimated:
    """The data of an `Estimate`.

    Attributes:
        device: the device, for people.
        memory_bytes: what the step may take there; None where that is not known.
        graph: the step, as solvers see it.
        peak_bytes: of the plain step, as predicted.
        margin_bytes: the measured peak is at most this much higher: rounding of the allocator, workspaces that are not known.
        parts: what is live at the peak.
        peak_at: the op that runs at the peak, with its module and line.
        floor_bytes: no schedule of this step has a lower peak.
        floor_at: the op that holds it; "" without ops.
        lowest_bytes: the lowest peak that was found.
        plan: the plan for the device's memory, margin left free; None where the plain step fits, where none was found, and
            where the memory is not known.
        why_no_plan: why none was found; "" where one was, or none is needed.
        modules: what the plain step keeps for the backward, by module, and what it would take to recompute it; see `ModuleRow`.
        remedies: what else would help, the most bytes first.
        provenance: as in `Plan`.
    """

    device: str
    memory_bytes: int | None
    graph: Graph = field(repr=False)
    peak_bytes: int
    margin_bytes: int
    parts: Parts
    peak_at: str
    floor_bytes: int
    floor_at: str
    lowest_bytes: int
    plan: PlannedGraph | None
    why_no_plan: str
    modules: tuple[ModuleRow, ...]
    remedies: tuple[Remedy, ...]
    provenance: Provenance

    @property
    def needed_bytes(self) -> int:
        """What the plain step needs to be safe: its peak and the margin."""
        return self.peak_bytes + self.margin_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the plain step fits, margin included; None where the memory is not known."""
        return None if self.memory_bytes is None else self.needed_bytes <= self.memory_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the plain step's need exceeds the memory; 0 where it fits, or the memory is not known."""
        return 0 if self.memory_bytes is None else max(0, self.needed_bytes - self.memory_bytes)

    @property
    def fits_planned(self) -> bool | None:
        """Whether it fits, planned where it must be; None where the memory is not known."""
        return None if self.memory_bytes is None else bool(self.fits) or self.plan is not None


def estimate_graph(
    graph: Graph,
    *,
    device: str,
    memory_bytes: int | None,
    margin: Margin,
    provenance: Provenance,
    own: PlainStep | None = None,
    remedies: Sequence[Remedy] = (),
    limits: Limits | None = None,
) -> Estimated:
    """Estimate a step.

    Args:
        graph: the joint graph, with what is reserved.
        device, memory_bytes, provenance: as in `Estimated`.
        margin: by how much a measured peak may exceed the predicted one.
        own: the model's own step without what is reserved, where it is known; else the graph's plain step stands for it.
        remedies: beside those that the graph itself shows.
        limits: of the solver, for the lowest peak and the plan together.
    """
    plain, limits, solver = simulate(graph, keep_all(graph)), limits or Limits(), Solver(graph)
    lowest_bytes = solver.lowest_peak(limits.share(_LOWEST_SHARE))
    step = graph_step(graph) if own is None else with_reserved(own, graph)
    plan, why, margin_bytes = None, "", margin(step.peak_bytes)
    if memory_bytes is not None and step.peak_bytes + margin_bytes > memory_bytes:
        plan, why = _plan(graph, solver, memory_bytes, margin, provenance, limits.share(1 - _LOWEST_SHARE))
    floor_bytes, floor_at = proven_floor(graph, solver)
    half = simulate(smaller_batch(graph), keep_all(graph)).peak_bytes
    found = [*remedies, *([] if has_one_sample(graph) else [Remedy("half the batch", plain.peak_bytes - half)])]
    return Estimated(
        device=device,
        memory_bytes=memory_bytes,
        graph=graph,
        peak_bytes=step.peak_bytes,
        margin_bytes=margin_bytes,
        parts=step.parts,
        peak_at=step.peak_at,
        floor_bytes=floor_bytes,
        floor_at=floor_at,
        lowest_bytes=lowest_bytes,
        plan=plan,
        why_no_plan=why,
        modules=rows_of(_kept(graph, provenance)),
        remedies=tuple(sorted((each for each in found if each.saved_bytes > 0), key=lambda each: -each.saved_bytes)),
        provenance=provenance,
    )


_LOWEST_SHARE = 0.2
"""Of the effort, for the lowest peak that can be reached."""


def _kept(graph: Graph, provenance: Provenance) -> PlannedGraph:
    """The plain step as a plan."""
    plain = Solution("optimal", keep_all(graph), graph.plain_ns, 0.0, "none")
    return PlannedGraph(graph, 0, 0, plain, provenance)


def _plan(
    graph: Graph, solver: Solver, memory_bytes: int, margin: Margin, provenance: Provenance, limits: Limits
) -> tuple[PlannedGraph | None, str]:
    """The plan for a memory, and why there is none."""
    margin_bytes = margin(memory_bytes)
    try:
        solution = solver.solve(max(1, memory_bytes - margin_bytes), limits)
    except (InfeasibleBudgetError, NoScheduleFoundError) as error:
        lowest = solver.archive.lowest.timeline.peak_bytes
        return None, str(restated(error, format_bytes(memory_bytes), memory_bytes, margin, lowest))
    return PlannedGraph(graph, memory_bytes, margin_bytes, solution, provenance), ""


def graph_step(graph: Graph) -> PlainStep:
    """The plain step of a graph: every op once, in captured order."""
    schedule = keep_all(graph)
    plain = simulate(graph, schedule)
    peak_at = graph.ops[plain.peak_step].text if graph.ops else ""
    return PlainStep(plain.peak_bytes, parts_at(graph, schedule, plain.peak_step), peak_at)


def with_reserved(step: PlainStep, graph: Graph) -> PlainStep:
    """The step with what the graph reserves beside it; gradients of earlier micro-steps are the step's own."""
    sizes = {name: getattr(step.parts, name) for name in ("optimizer_bytes", "reserved_bytes")}
    reserved = values_set_aside(graph)
    for value in reserved:
        sizes[_reserved_part(value.name)] += value.nbytes
    more = sum(value.nbytes for value in reserved)
    return PlainStep(step.peak_bytes + more, replace(step.parts, **sizes), step.peak_at)


def parts_at(graph: Graph, schedule: Schedule, step: int) -> Parts:
    """What is live at a step of a schedule, by what it is for."""
    sizes = dict.fromkeys((each.name for each in fields(Parts)), 0)
    for span in spans(graph, schedule):
        if span.start <= step <= span.end:
            sizes[_part_of(graph, span)] += span.nbytes
    if schedule.steps:
        sizes["workspace_bytes"] = max(0, graph.ops[schedule.steps[step]].workspace_bytes)
    return Parts(**sizes)


_RESIDENT = {Kind.PARAM: "parameters_bytes", Kind.BUFFER: "buffers_bytes"}
_PARTS = {
    MemoryKind.INPUTS: "inputs_bytes",
    MemoryKind.IN_FLIGHT: "activations_bytes",
    MemoryKind.GRADIENTS: "gradients_bytes",
    MemoryKind.KEPT: "activations_bytes",
    MemoryKind.RECOMPUTED: "activations_bytes",
    MemoryKind.TEMPORARY: "temporaries_bytes",
}


def _part_of(graph: Graph, span: Span) -> str:
    if span.part is MemoryKind.RESERVED:
        return _reserved_part(span.name)
    return _RESIDENT[graph.value[span.name].kind] if span.part is MemoryKind.PARAMETERS else _PARTS[span.part]


def _reserved_part(name: str) -> str:
    return "optimizer_bytes" if name in OPTIMIZER else "reserved_bytes"


def smaller_batch(graph: Graph, divisor: int = 2) -> Graph:
    """The step with a batch of a fraction of the size, about: what depends on the call's tensors shrinks with it.

    Parameters, what is computed of parameters alone (casts of weights, masks), gradients of parameters and what is reserved
    stay as they are. Workspaces shrink. Exact where every such tensor has the batch as a dimension.
    """
    depends = {value.name for value in graph.values if value.kind in (Kind.INPUT, Kind.TANGENT)}
    for op in graph.ops:
        if depends.intersection(op.reads):
            depends.update(op.writes)
    depends.difference_update(graph.backward_outputs)

    def size(nbytes: int) -> int:
        return -(-nbytes // divisor)

    values = (
        replace(value, nbytes=size(value.nbytes), hidden_bytes=min(value.hidden_bytes, size(value.nbytes)))
        if value.name in depends
        else value
        for value in graph.values
    )
    ops = (replace(op, workspace_bytes=size(op.workspace_bytes)) for op in graph.ops)
    return replace(graph, values=tuple(values), ops=tuple(ops))
