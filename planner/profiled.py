"""A training step that was captured and profiled: what `plan`, `sweep` and `max_batch` start from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from planner import arguments, units
from planner.analysis.budgets import Budget, Refusal, check_budgets, restated, size_refused
from planner.analysis.margin import allocator_margin, margin_of, smallest_budget
from planner.analysis.sweep import MeasuredPoint, sweep_graph
from planner.captured import CapturedStep, captured, criterion_inside
from planner.errors import BudgetError, CaptureError, InfeasibleBudgetError, NoScheduleFoundError, PlanCheckError, PlannerError
from planner.graph.accumulation import values_set_aside
from planner.graph.floor import floor_advice, has_one_sample
from planner.graph.graph import Graph
from planner.graph.planned import NOT_RUN
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.log import PLANNER
from planner.options import PlanOptions
from planner.other_states import plans_of_other_states
from planner.profiler.devices import find_device
from planner.profiler.estimate import DeviceModel, estimate
from planner.profiler.measure import measure
from planner.profiler.optimizer import master_bytes, state_bytes
from planner.profiler.profile import Profile
from planner.report.progress import stage
from planner.results.explanation import Explanation
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from planner.runtime.module import CheckpointedModule
from planner.runtime.ranks import communicates
from planner.solver.solve import Solver
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import noting
from planner.tracer.joint import Joint
from planner.tracer.lower import kernel_nodes, lower
from planner.tracer.real_layouts import capture
from planner.tracer.target_device import TargetDevice
from planner.verification.measured import measured, measured_within, noted
from planner.verification.step_copy import autocast_of
from planner.verification.verify import verify


@dataclass(frozen=True, slots=True)
class ProfiledStep(CapturedStep):
    """A training step with the bytes and the time of every kernel. It keeps the model and the call.

    Attributes:
        model, args, kwargs, options, joint: as in `CapturedStep`.
        graph: what solvers see.
        provenance: as in `Plan`.
    """

    graph: Graph
    provenance: Provenance

    @property
    def plain_bytes(self) -> int:
        """Peak of the step that keeps everything."""
        return simulate(self.graph, keep_all(self.graph)).peak_bytes

    def plan(self, budget: Budget) -> CheckpointedModule:
        """The model, with its training step checkpointed so that it fits a budget; see `planner.plan`."""
        units.check_budget(budget)
        with one_at_a_time():
            planned = self._planned(budget)
            planned.alternatives.extend(self._of_other_states(planned, budget))
            for args, kwargs in self.options.also:
                other = profiled(self.model, args, kwargs, self.options)
                planned.alternatives.append(other._planned(budget, planned.plan.budget_bytes))
            try:
                for args, kwargs in self.options.sizes:
                    planned.prepare(args, kwargs)
            except CaptureError as error:
                raise size_refused(error, planned.plan.budget_bytes, self._others_need) from None
        return planned

    @property
    def plan_anew(self) -> Callable[..., CheckpointedModule]:
        """What plans calls of other sizes, as this one was planned."""
        return PlanAnew(replace(self._of_further_calls, check=False))

    @property
    def _of_further_calls(self) -> PlanOptions:
        """The options for other calls of the model. Bytes set aside are a number: a planned module holds no optimizer."""
        aside = sum(value.nbytes for value in values_set_aside(self.graph))  # the other gradients are counted by `accumulate`
        return replace(self.options, reserve=aside, optimizer=None, master_weights=False, also=(), sizes=())

    def sweep(
        self,
        budgets: Sequence[Budget] | None = None,
        *,
        points: int = 20,
        low: Budget | None = None,
        high: Budget | None = None,
    ) -> Sweep:
        """What this step costs at many budgets; see `planner.sweep`. `apply(sweep.plan(point))` applies a point."""
        check_budgets(budgets, points, low, high)
        with one_at_a_time(), stage("solve", self.options.progress):
            swept = sweep_graph(
                self.graph,
                budgets,
                points=points,
                low=low,
                high=high,
                margin=margin_of(self.graph),
                limits=self.options.limits,
                provenance=self.provenance,
            )
        return Sweep.of(swept, None if self.joint.absent_device else self._measured)

    def explain(self, budget: Budget) -> Explanation:
        """Why the plan for a budget keeps what it keeps, and what more memory would be worth; see `Plan.explain`.

        Raises:
            BudgetError, InfeasibleBudgetError, NoScheduleFoundError: as `planner.plan`.
        """
        budget_bytes = self.budget_bytes(budget)
        try:
            made = self.solved(budget_bytes, self.options.limits)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            raise self.refusal(error, budget, budget_bytes) from None
        return made.explain(effort=self.options.effort, time_limit_s=self.options.time_limit_s)

    def budget_bytes(self, budget: Budget) -> int:
        """Bytes of a budget; see `units.parse_budget`.

        Raises:
            BudgetError: unreadable, or bytes that the device does not have.
        """
        return budget_bytes(budget, self.plain_bytes, self.options)

    def solved(self, budget_bytes: int, limits: Limits, known: Sequence[Schedule] = ()) -> Plan:
        """The best plan found within a budget.

        Args:
            known: schedules of graphs with this graph's wiring, which compete.

        Raises:
            InfeasibleBudgetError, NoScheduleFoundError: there is none; or none was found.
        """
        margin_bytes = allocator_margin(self.graph, budget_bytes)
        solver = Solver(self.graph)
        for schedule in known:
            solver.offer(schedule, "another size")
        solution = solver.solve(budget_bytes - margin_bytes, limits)
        made = Plan(self.graph, budget_bytes, margin_bytes, solution, self.provenance)
        peak, budget = units.format_bytes(made.peak_bytes), units.format_bytes(budget_bytes)
        text = "planned for %s: peak %s, %+.1f %% of simulated time, %s in %.1f s"
        PLANNER.info(text, budget, peak, 100 * made.overhead, solution.status, solution.solve_s)
        return made

    def refusal(self, error: Refusal, budget: Budget, budget_bytes: int, *, is_least_batch: bool = False) -> Refusal:
        """What `solved` raised for `budget_bytes`, with the budget as the user gave it and one for which there is a plan.

        That one is searched for: the lowest peak found with half of the effort, where the proven floor is not reached.

        Args:
            is_least_batch: the model runs no smaller one.
        """
        is_least_batch = is_least_batch or has_one_sample(self.graph)
        if is_least_batch and isinstance(error, InfeasibleBudgetError):
            error.advice = floor_advice(self.graph, is_least_batch=True)
        lowest = Solver(self.graph).lowest_peak(self.options.limits.share(1 / 2))
        margin = margin_of(self.graph)
        fraction, plain_bytes = units.fraction_of(budget), None
        if fraction is not None:  # of another call's plain peak, where that one's budget is this one's, too
            is_own = budget_bytes == self.budget_bytes(budget)
            plain_bytes = self.plain_bytes if is_own else round(budget_bytes / fraction)
        asked, need = units.budget_text(budget, budget_bytes), self._others_need
        return restated(
            error, asked, budget_bytes, margin, lowest, plain_bytes, is_least_batch=is_least_batch, others_need=need
        )

    @property
    def _others_need(self) -> int:
        """Bytes of a budget for which plans of all further calls are found; one that cannot be captured has its own error."""
        found, limits = [0], self.options.limits.share(1 / 2)
        for args, kwargs in (*self.options.also, *self.options.sizes):
            with contextlib.suppress(PlannerError):
                graph = profiled(self.model, args, kwargs, self.options).graph
                found.append(smallest_budget(Solver(graph).lowest_peak(limits), margin_of(graph)))
        return max(found)

    def _planned(self, budget: Budget, budget_bytes: int | None = None) -> CheckpointedModule:
        """The planned module for this call alone.

        Args:
            budget_bytes: of another call, which are this one's, too; None: those of `budget`.
        """
        budget_bytes = self.budget_bytes(budget) if budget_bytes is None else budget_bytes
        fraction = units.fraction_of(budget)

        def within(aim_bytes: int) -> CheckpointedModule:
            return self._within(budget_bytes, aim_bytes, fraction)

        try:
            return self._checked(budget_bytes, within, only_measured=fraction is not None)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            raise self.refusal(error, budget, budget_bytes) from None

    def _within(self, budget_bytes: int, aim_bytes: int, fraction: float | None = None) -> CheckpointedModule:
        """The planned module for a budget, solved for less; the rest is margin."""
        with stage("solve", self.options.progress):
            made = self.solved(aim_bytes, self.options.limits)
        made = replace(made, budget_bytes=budget_bytes, margin_bytes=made.margin_bytes + budget_bytes - aim_bytes)
        return self.rewritten(made, fraction)

    def _of_other_states(self, planned: CheckpointedModule, budget: Budget) -> list[CheckpointedModule]:
        """Planned modules for calls that find other Python state; those that cannot be planned run unplanned."""
        if self.joint.absent_device or communicates(self.joint):
            return []
        opaque = tuple(dict.fromkeys((*self.options.opaque, *self.provenance.opaque)))
        options = replace(self._of_further_calls, dynamic=False, opaque=opaque)

        def plan_for(calls: str) -> CheckpointedModule | None:
            try:
                with stage(f"plan for {calls}", options.progress), autocast_of(planned):
                    joint = capture(self.model, self.args, self.kwargs, loss=options.loss, opaque=opaque, as_found=True)
                    captured_step = CapturedStep(self.model, self.args, self.kwargs, options, joint)
                    step = with_costs(captured_step, set_aside(self.model, options, None))
                    step = replace(step, provenance=replace(step.provenance, call=calls))
                    return step._planned(budget, planned.plan.budget_bytes)
            except PlanCheckError as error:
                PLANNER.warning("no plan for %s: %s", calls, error)
            except PlannerError as error:
                PLANNER.info("no plan for %s: %s", calls, error)
            return None

        return plans_of_other_states(self, planned, plan_for)

    def planned_like(self, plan: Plan) -> CheckpointedModule:
        """The planned module for the budget of a plan of another call, with the margin that its measured step needed.

        Raises:
            InfeasibleBudgetError, NoScheduleFoundError: no schedule fits the budget, or none was found.
        """
        budget_bytes = plan.budget_bytes
        spare_bytes = max(0, plan.margin_bytes - allocator_margin(plan.graph, budget_bytes))
        try:
            planned = self._within(budget_bytes, budget_bytes - spare_bytes)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            raise self.refusal(error, units.format_bytes(budget_bytes), budget_bytes) from None
        return noted(planned, f"{NOT_RUN}: {self.why_not_run}")

    def _checked(
        self, budget_bytes: int, within: Callable[[int], CheckpointedModule], *, only_measured: bool
    ) -> CheckpointedModule:
        """A planned module whose step was run, if it may be. `only_measured`: a fraction of an estimate holds for estimates."""
        if self.why_not_run:
            return noted(within(budget_bytes), f"{NOT_RUN}: {self.why_not_run}")
        is_on_cpu = self.joint.device.type == "cpu"
        call, progress = (self.args, self.kwargs), self.options.progress
        if only_measured and self.provenance.is_estimated and not self.options.compile and is_on_cpu:
            return measured(within(budget_bytes), *call, progress=progress)
        return measured_within(budget_bytes, within, *call, progress=progress)

    def _measured(self, made: Plan, rounds: int) -> MeasuredPoint:
        """One of a sweep's plans, run on the side."""
        report = verify(self.rewritten(made), self.args, self.kwargs, rounds=rounds)
        peak_bytes = report.measured_peak_bytes
        return MeasuredPoint(made.budget_bytes, peak_bytes, report.time_ratio, report.exact, report.time_spread)


@dataclass(frozen=True, slots=True)
class PlanAnew:
    """Plans a call that comes while the model trains; no step is run to check it."""

    options: PlanOptions

    def __call__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], joint: Joint, plan: Plan
    ) -> CheckpointedModule:
        """The planned module for a captured call, within the budget of `plan`.

        Raises:
            CaptureError: its graph communicates, and ranks would plan at different times.
            InfeasibleBudgetError, NoScheduleFoundError: no schedule fits the budget, or none was found.
        """
        if communicates(joint):
            raise CaptureError("its forward communicates with other ranks, which would wait while this one plans")
        step = CapturedStep(model, tuple(args), dict(kwargs), self.options, joint)
        return with_costs(step, set_aside(model, self.options, None)).planned_like(plan)


def profiled(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: PlanOptions,
    *,
    autocast: torch.dtype | None = None,
) -> ProfiledStep:
    """Capture a training step and find the costs of its kernels: measured on the device, or estimated.

    Args:
        autocast: of a device that is not here: the forward runs under autocast of this dtype there.

    Raises:
        InputError, CaptureError: what was given cannot be planned; says why.
    """
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    model, named, options = criterion_inside(model, kwargs, options)
    target = target_device(options)
    aside = set_aside(model, options, target)
    try:
        there = None if target is None else TargetDevice(target.name, target.capability, autocast)
        step = captured(model, args, named, options, there)
    except CaptureError as error:
        if error.is_models_own:
            raise
        cure = "planner.plan_units plans what can be captured of its submodules" if [*model.children()] else ""
        raise CaptureError(f"{str(error).rstrip('.')}. {cure}".rstrip(". "), module=error.module) from error
    with one_at_a_time():
        return with_costs(step, aside)


def with_costs(step: CapturedStep, aside: Mapping[str, int] | None = None) -> ProfiledStep:
    """A captured step with its costs; `aside`: bytes that are resident beside it, by what they are for."""
    profile = _profile(step)
    with noting("lowering a captured step to the solver's graph"):
        options = step.options
        accumulate = options.num_stages if options.accumulate else 0
        graph = lower(step.joint, profile, reserved=aside or {}, accumulate=accumulate, in_flight=options.in_flight)
    held = {each.name: getattr(step, each.name) for each in fields(CapturedStep)}
    found = ProfiledStep(**held, graph=graph, provenance=_provenance(step, profile))
    num_ops, plain = len(graph.ops), units.format_bytes(found.plain_bytes)
    PLANNER.info("%d ops, the plain step peaks at %s; costs: %s", num_ops, plain, found.provenance)
    return found


def target_device(options: PlanOptions) -> DeviceModel | None:
    """The device to plan for, where it is not here.

    Raises:
        InputError: it is not known.
    """
    return None if options.device is None else find_device(options.device)


def budget_bytes(budget: Budget, plain_bytes: int, options: PlanOptions) -> int:
    """Bytes of a budget; see `units.parse_budget`.

    Raises:
        BudgetError: unreadable, or bytes that the device does not have.
    """
    nbytes, target = units.parse_budget(budget, plain_bytes), target_device(options)
    if target is not None and not units.is_fraction(budget) and nbytes > target.memory_bytes > 0:
        has = units.format_bytes(target.memory_bytes)
        raise BudgetError(f"budget {units.format_bytes(nbytes)} is more than the {has} that {target.name} has")
    return nbytes


def set_aside(model: nn.Module, options: PlanOptions, target: DeviceModel | None) -> dict[str, int]:
    """Bytes that are resident beside the step, by what they are for."""
    asked = {"reserved": options.reserve_bytes}
    if options.optimizer is not None:
        asked["optimizer state"] = state_bytes(model, options.optimizer, master_weights=options.master_weights)
    if options.master_weights:
        asked["float32 weights"] = master_bytes(model)
    if target is not None:
        asked["libraries"] = target.library_bytes
    return {purpose: nbytes for purpose, nbytes in asked.items() if nbytes}


def _profile(step: CapturedStep) -> Profile:
    nodes, target = kernel_nodes(step.joint), target_device(step.options)
    if target is not None or step.options.costs == "estimate":
        return estimate(nodes, target)
    return measure(nodes, step.joint.device, remeasure=step.options.remeasure, progress=step.options.progress)


def _provenance(step: CapturedStep, profile: Profile) -> Provenance:
    return Provenance(
        costs="estimated" if profile.model else "measured",
        device=profile.device,
        is_here=not step.joint.absent_device,
        model=profile.model,
        num_kernels=profile.num_kernels,
        num_estimated=profile.num_estimated,
        spread=round(profile.spread, 4),
        opaque=tuple(dict.fromkeys(spec.module for spec in step.joint.opaque_calls.values())),
        repeats=tuple((kind, len(names)) for kind, names in step.joint.repeats.items()),
        torch=str(torch.__version__),
        date=time.strftime("%Y-%m-%d"),
        module=type(step.model).__name__,
        loss=tuple(output.name for output in step.joint.outputs if output.differentiated),
    )
