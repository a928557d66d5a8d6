"""A training step captured and priced, ready to be planned: what `plan`, `sweep` and `max_batch` do first, and alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner import arguments, units
from planner.analysis.budgets import Refusal, restated
from planner.errors import BudgetError, CaptureError, InputError
from planner.graph.graph import Graph
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.log import PLANNER
from planner.profiler.devices import find_device
from planner.profiler.estimate import DeviceModel, estimate
from planner.profiler.measure import measure
from planner.profiler.optimizer import Optimizer, master_bytes, state_bytes
from planner.profiler.profile import Profile
from planner.report.progress import stage
from planner.results.plan import Plan
from planner.solver.solve import Solver, solve
from planner.tracer.faults import noting
from planner.tracer.joint import Joint
from planner.tracer.loss import Loss
from planner.tracer.lower import kernel_nodes, lower
from planner.tracer.real_layouts import capture
from planner.tracer.target_device import TargetDevice


@dataclass(frozen=True, slots=True)
class Options:
    """How to capture and price a step; the fields are arguments of `planner.plan`.

    Raises:
        BudgetError: `reserve` or `costs` cannot be read.
        InputError: an unknown device, or one that is not here to compile for; an argument of another type.
    """

    loss: Loss = None
    reserve: int | str = 0
    costs: str = "measure"
    opaque: Collection[str] = ()
    progress: bool = True
    device: str | DeviceModel | None = None
    optimizer: Optimizer | None = None
    master_weights: bool = False
    compile: bool = False
    reserve_bytes: int = field(init=False)
    target: DeviceModel | None = field(init=False)
    """The device, where it is not here."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", arguments.loss_choice(self.loss))
        object.__setattr__(self, "opaque", arguments.names(self.opaque))
        arguments.check_flags(progress=self.progress, master_weights=self.master_weights, compile=self.compile)
        arguments.check_optimizer(self.optimizer)
        if not isinstance(self.costs, str) or self.costs not in ("measure", "estimate"):
            raise BudgetError(f"costs={units.shown(self.costs)} is not known; use 'measure' or 'estimate'")
        if self.compile and self.device is not None:
            raise InputError("compile=True needs the device here; save the plan, and apply(plan, ..., compile=True) there")
        object.__setattr__(self, "reserve_bytes", units.parse_bytes(self.reserve, "reserve", least=0))
        object.__setattr__(self, "target", None if self.device is None else find_device(self.device))

    @property
    def elsewhere(self) -> TargetDevice | None:
        """The device for the tracer, where it is not here."""
        if self.target is None:
            return None
        return TargetDevice(self.target.name, self.target.capability)

    def budget_bytes(self, budget: int | str | float, plain_bytes: int) -> int:
        """Bytes of a budget; see `units.parse_budget`.

        Raises:
            BudgetError: unreadable, or bytes that the device does not have.
        """
        nbytes = units.parse_budget(budget, plain_bytes)
        if self.target is not None and not units.is_fraction(budget) and nbytes > self.target.memory_bytes > 0:
            has = units.format_bytes(self.target.memory_bytes)
            raise BudgetError(f"budget {units.format_bytes(nbytes)} is more than the {has} that {self.target.name} has")
        return nbytes

    def set_aside(self, model: nn.Module) -> dict[str, int]:
        """Bytes that are resident beside the step, by what they are for."""
        asked = {"reserved": self.reserve_bytes}
        if self.optimizer is not None:
            asked["optimizer state"] = state_bytes(model, self.optimizer, master_weights=self.master_weights)
        if self.master_weights:
            asked["float32 weights"] = master_bytes(model)
        if self.target is not None:
            asked["libraries"] = self.target.library_bytes
        return {purpose: nbytes for purpose, nbytes in asked.items() if nbytes}


@dataclass(frozen=True, slots=True)
class Priced:
    """A captured step with its costs.

    Attributes:
        joint: as captured.
        graph: what solvers see.
        provenance: as in `Plan`.
    """

    joint: Joint
    graph: Graph
    provenance: Provenance

    @property
    def plain_bytes(self) -> int:
        """Peak of the step that keeps everything."""
        return simulate(self.graph, keep_all(self.graph)).peak_bytes

    @property
    def is_on_cpu(self) -> bool:
        """The step runs on a CPU."""
        return self.joint.device.type == "cpu"

    def plan(self, budget_bytes: int, limits: Limits) -> Plan:
        """The best plan found within a budget.

        Raises:
            InfeasibleBudgetError, NoScheduleFoundError: there is none; or none was found.
        """
        margin_bytes = allocator_margin(self.graph, budget_bytes)
        solution = solve(self.graph, budget_bytes - margin_bytes, limits)
        made = Plan(self.graph, budget_bytes, margin_bytes, solution, self.provenance)
        peak, budget = units.format_bytes(made.peak_bytes), units.format_bytes(budget_bytes)
        text = "planned for %s: peak %s, %+.1f %% of simulated time, %s in %.1f s"
        PLANNER.info(text, budget, peak, 100 * made.overhead, solution.status, solution.solve_s)
        return made

    def refusal(self, error: Refusal, budget: int | str | float, budget_bytes: int, limits: Limits) -> Refusal:
        """What `plan` raised for `budget_bytes`, with the budget as the user gave it and one for which there is a plan.

        That one is searched for: the lowest peak found with half of the effort, where the proven floor is not reached.
        """
        solver = Solver(self.graph)
        lowest = solver.lowest_peak(limits.share(1 / 2))
        margin = _margin_of(self.graph)
        return restated(error, units.budget_text(budget, budget_bytes), budget_bytes, margin, lowest)


def price(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, options: Options) -> Priced:
    """Capture a step and price its kernels: measured on the device, or estimated.

    Raises:
        InputError, CaptureError: what was given cannot be planned; says why.
    """
    aside = options.set_aside(model)
    try:
        with stage("capture", options.progress):
            joint = capture(model, args, kwargs, loss=options.loss, opaque=options.opaque, target=options.elsewhere)
    except CaptureError as error:
        hint = "planner.plan_children plans what can be captured of its submodules" if [*model.children()] else ""
        raise CaptureError(f"{str(error).rstrip('.')}. {hint}".rstrip(". "), module=error.module) from error
    return price_joint(joint, options, aside)


def price_joint(joint: Joint, options: Options, aside: Mapping[str, int] | None = None) -> Priced:
    """Price a captured step; `aside`: bytes that are resident beside it, by what they are for."""
    profile = _profile(joint, options)
    with noting("lowering a captured step to the solver's graph"):
        priced = Priced(joint, lower(joint, profile, reserved=aside or {}), _provenance(joint, profile))
    num_ops, plain = len(priced.graph.ops), units.format_bytes(priced.plain_bytes)
    PLANNER.info("%d ops, the plain step peaks at %s; costs: %s", num_ops, plain, priced.provenance)
    return priced


def allocator_margin(graph: Graph, budget_bytes: int) -> int:
    """Part of the budget left free for what no graph shows: allocator rounding, host-side tensors, the engine.

    A thousandth of what the plain step allocates, at most a hundredth of the budget; none when the plain
    step itself fits, so that a full budget never forces a recompute.
    """
    return _margin_of(graph)(budget_bytes)


def _margin_of(graph: Graph) -> Callable[[int], int]:
    """The margin by budget; what is left of a budget never falls as it grows."""
    plain = simulate(graph, keep_all(graph)).peak_bytes
    resident = sum(graph.value[name].nbytes for name in graph.inputs)
    return lambda budget_bytes: 0 if plain <= budget_bytes else min((plain - resident) // 1000, budget_bytes // 100)


def _profile(joint: Joint, options: Options) -> Profile:
    nodes = kernel_nodes(joint)
    if options.target is not None or options.costs == "estimate":
        return estimate(nodes, options.target)
    return measure(nodes, joint.device, progress=options.progress)


def _provenance(joint: Joint, profile: Profile) -> Provenance:
    return Provenance(
        costs="estimated" if profile.model else "measured",
        device=profile.device,
        is_here=not joint.absent_device,
        model=profile.model,
        num_kernels=profile.num_kernels,
        num_estimated=profile.num_estimated,
        opaque=tuple(dict.fromkeys(spec.module for spec in joint.opaque_calls.values())),
        torch=str(torch.__version__),
        date=time.strftime("%Y-%m-%d"),
    )
