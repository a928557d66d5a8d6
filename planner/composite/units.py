"""plan_units, apply_units: each unit of a model planned on its own, within one budget for the whole step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn

from planner import arguments, units
from planner.analysis.budgets import Budget
from planner.captured import CapturedStep
from planner.composite.kinds import UnitKind, kinds_of
from planner.composite.planned import PlannedUnits
from planner.composite.search import Found, UnitSearch
from planner.composite.trial import Made, Trial
from planner.composite.unit_names import Largest, Units, largest, named_units, repeated
from planner.errors import CaptureError, CompileError, InputError, MeasuredPeakError, PlanFileError
from planner.graph.graph import Graph
from planner.graph.outer import OuterGraph
from planner.graph.planned_units import PlannedKind
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import DEFAULT_EFFORT
from planner.log import PLANNER
from planner.options import PlanOptions
from planner.profiled import profiled
from planner.report.progress import stage
from planner.results.plan import Plan
from planner.results.unit_plan import UnitPlan
from planner.runtime.step import DEFAULT_STAGES
from planner.tracer.capture import one_at_a_time
from planner.tracer.loss import Loss
from planner.tracer.lower import accumulating_as_eager


def plan_units(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    units: Units = None,
    loss: Loss = None,
    costs: Literal["measure", "estimate"] | None = None,
    effort: float = DEFAULT_EFFORT,
    time_limit_s: float | None = None,
    num_stages: int = DEFAULT_STAGES,
    accumulate: bool = False,
    compile: bool = False,
    progress: bool = True,
) -> PlannedUnits:
    """Plan each unit of a model on its own, and install the plans: the model trains with them, in place.

    A unit is a submodule that the model's own Python code calls: a transformer block, a stage of a network. Nothing is
    recomputed across units, and what lies around them runs as it is. Equal units are captured, profiled and solved once. A
    small program then picks, for each unit, how much it saves. Where the whole step can be captured as well, what the outer
    code holds is known from its graph; else it is measured, in a step of a copy of the model.

    Args:
        model, args, kwargs, loss, costs, num_stages, accumulate, progress: as for `plan`.
        budget: bytes, text ("6GiB"), or a float in (0, 1]: fraction of the plain step's measured peak.
        units: qualified names, or a class (or several), whose outermost instances are meant. Default: the repeated blocks;
            where there are none, the largest submodules that can be captured.
        effort, time_limit_s: for the solver, for all kinds of units together; see `plan`.
        compile: let inductor compile the units, once for all units of a kind that run alike.

    Returns:
        PlannedUnits, installed. `planner.unplan(model)` undoes that.

    Raises:
        BudgetError, InputError: as for `plan`; or `units` names what cannot be a unit.
        CaptureError: no unit can be captured; says why, for each.
        CompileError: inductor cannot compile a unit, or makes of it what needs more than the budget.
        NoScheduleFoundError: the step peaks above the budget with every unit at its lowest.
    """
    options = PlanOptions(
        loss=loss,
        costs=costs,
        effort=effort,
        time_limit_s=time_limit_s,
        num_stages=num_stages,
        accumulate=accumulate,
        compile=compile,
        progress=progress,
    )
    found = planned_units(model, budget, args, kwargs, units, options)
    found.install()
    return found


def planned_units(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    wanted: Units | Largest,
    options: PlanOptions,
    *,
    is_whole_captured: bool = True,
) -> PlannedUnits:
    """As `plan_units`, not installed.

    Args:
        is_whole_captured: try to capture the whole step, for what its outer code holds.
    """
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    units.check_budget(budget)
    names = None if wanted is None or isinstance(wanted, Largest) else named_units(model, wanted)
    trial = Trial(model, args, kwargs, options.loss, accumulates=options.accumulate)
    with one_at_a_time():
        with stage("measure steps", options.progress):
            plain = trial.peak({})
        if plain is None and units.is_fraction(budget):
            raise InputError("the plain step does not fit on the device, so a fraction of it is unknown: give bytes")
        with stage("capture", options.progress):
            kinds, left = _kinds(trial, names, options, takes_blocks=wanted is None)
            whole = _whole(trial, options) if is_whole_captured else None
        with stage("solve", options.progress):
            search = UnitSearch(trial, kinds, options.limits, whole)
        with stage("measure steps", options.progress):
            plain = trial.peak({}, varies=True) if search.outer.is_measured and plain is not None else plain
            budget_bytes = units.parse_budget(budget, plain or 0)
            found = search.within(budget_bytes)
        made = search.made(found.points)
        if options.compile:
            with stage("compile", options.progress):
                made = search.made(found.points, is_compiled=True)
            found = replace(found, peak_bytes=_measured_within(budget_bytes, trial, made, search.outer))
    plan = _plan(search, kinds, left, budget_bytes, plain, found)
    return PlannedUnits(model, plan, made, options.loss, trial.autocast)


def _kinds(
    trial: Trial, names: Sequence[str] | None, options: PlanOptions, *, takes_blocks: bool
) -> tuple[list[UnitKind], dict[str, str]]:
    """The units that the user wants; by default the repeated blocks, and without any the largest submodules."""
    if names is not None:
        return kinds_of(trial, names, options, descends=False)
    blocks = repeated(trial.original) if takes_blocks else ()
    if not any(trial.submodules.counts[name] for name in blocks):  # another branch ran
        blocks = ()
    return kinds_of(trial, blocks or largest(trial.original), options, descends=True)


def _whole(trial: Trial, options: PlanOptions) -> Graph | None:
    """The graph of the whole step; None where it cannot be captured."""
    try:
        found = profiled(trial.original, *trial.call, replace(options, accumulate=False))
        return accumulating_as_eager(found.joint, found.graph) if options.accumulate else found.graph
    except (CaptureError, InputError) as error:
        PLANNER.info("the whole step cannot be captured, outer code is measured: %s", error)
        return None


def _plan(
    search: UnitSearch, kinds: Sequence[UnitKind], left: Mapping[str, str], budget_bytes: int, plain: int | None, found: Found
) -> UnitPlan:
    """What was found, as data: of each front the points that are used."""
    schedules: list[list[Schedule]] = [[] for _ in kinds]
    positions: dict[str, tuple[int, int]] = {}
    number = {id(kind): k for k, kind in enumerate(kinds)}
    for unit, at in found.points.items():
        k, schedule = number[id(search.kinds[unit])], search.fronts[unit][at].schedule
        if schedule not in schedules[k]:
            schedules[k].append(schedule)
        positions[unit] = k, schedules[k].index(schedule)
    parts = tuple(
        PlannedKind(kind.name, kind.graph, tuple(own), kind.provenance) for kind, own in zip(kinds, schedules, strict=True)
    )
    return UnitPlan(parts, positions, search.outer, budget_bytes, plain, found.peak_bytes, found.bound_ns, dict(left))


def apply_units(
    plan: UnitPlan | str | os.PathLike[str],
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    num_stages: int = DEFAULT_STAGES,
    compile: bool = False,
    progress: bool = True,
) -> PlannedUnits:
    """Plan a model's units by a plan made before, without profiling or solving, and install them.

    Each kind of units is captured once, and its structure is compared with the plan's. One real step of a copy is measured.

    Args:
        plan: made for this model and call, here or elsewhere; or the name of the file that it was saved in.
        model, args, kwargs, loss, num_stages, compile, progress: as for `plan_units`.

    Raises:
        InputError, CaptureError: what was given cannot be planned; says why.
        PlanFileError: the file cannot be read, or the model's units are not those that the plan was made for; names the first
            difference.
        MeasuredPeakError, CompileError: the step needs more than the plan's budget here; CompileError where it is compiled.
    """
    if isinstance(plan, (str, os.PathLike)):
        plan = UnitPlan.load(plan)
    if not isinstance(plan, UnitPlan):
        raise InputError(f"give planned.plan, or the name of its file: plan is {units.kind(plan)}, not a UnitPlan")
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    options = PlanOptions(loss=loss, num_stages=num_stages, compile=compile, progress=progress)
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = next((name for name in plan.units if name not in modules), None)
    if missing is not None:
        raise PlanFileError(f"the plan was made for another model: this one has no submodule {missing}. Make it again.")
    trial = Trial(model, args, kwargs, options.loss, accumulates=plan.accumulates)
    made: dict[str, Made] = {}
    with one_at_a_time():
        for k, own in enumerate(plan.kinds):
            at = {name: at for name, (kind, at) in plan.units.items() if kind == k}
            with stage("capture", progress):
                found, _ = kinds_of(trial, list(at), options, partial(_recorded_costs, own), descends=False)
            with stage("compile", progress) if compile else nullcontext():
                for kind in found:
                    schedules = {name: own.schedules[at[name]] for name in kind.members}
                    made |= {name: kind.made(schedule, is_compiled=compile) for name, schedule in schedules.items()}
        with stage("measure steps", progress):
            peak = _measured_within(plan.budget_bytes, trial, made, plan.outer)
    fields = {name: getattr(plan, name) for name in ("kinds", "units", "outer", "budget_bytes", "plain_bytes")}
    here = UnitPlan(**fields, measured_bytes=peak, bound_ns=plan.bound_ns, left=plan.left)
    applied = PlannedUnits(model, here, made, loss, trial.autocast)
    applied.install()
    return applied


def _recorded_costs(kind: PlannedKind, step: CapturedStep) -> tuple[Graph, Provenance | None]:
    """The costs of a plan's kind, for a unit captured here.

    Raises:
        PlanFileError: the unit is not of this kind.
    """
    schedule = keep_all(kind.graph)
    plain = Solution("feasible", schedule, kind.graph.plain_ns, 0.0, "")
    peak = simulate(kind.graph, schedule).peak_bytes
    return step.recognized(Plan(kind.graph, peak, 0, plain, kind.provenance)).graph, kind.provenance


def _measured_within(budget_bytes: int, trial: Trial, made: Mapping[str, Made], outer: OuterGraph) -> int:
    """The measured peak of a step with these units planned.

    Raises:
        MeasuredPeakError, CompileError: it is above the budget; CompileError where they are compiled.
    """
    peak = trial.peak(made, varies=outer.is_measured)
    if peak is None or peak > budget_bytes:
        needs = "does not fit on the device" if peak is None else f"peaks at {units.format_bytes(peak)} ({peak} bytes)"
        if any(step.is_compiled for step, _, _ in made.values()):
            raise CompileError(
                f"compiled, the step {needs}; the budget is {units.format_bytes(budget_bytes)}. "
                "Plan without compile=True, which keeps the budget"
            )
        raise MeasuredPeakError(
            f"measured, the step {needs}; the budget is {units.format_bytes(budget_bytes)}. Make the plan again here",
            budget_bytes=budget_bytes,
            peak_bytes=peak or 0,
        )
    return peak
