"""plan, apply, sweep: the whole story on a page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from planner import arguments, units
from planner.analysis.budgets import check_budgets
from planner.analysis.sweep import Measured, sweep_graph
from planner.errors import InfeasibleBudgetError, NoScheduleFoundError, PlanFileError
from planner.graph.graph import Graph
from planner.graph.planned import NOT_RUN
from planner.graph.structure import fingerprint, first_difference, has_kernels, renamed
from planner.limits import Limits
from planner.priced import Options, allocator_margin, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.progress import stage
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from planner.runtime.criterion import Criterion, with_criterion
from planner.runtime.module import CheckpointedModule
from planner.runtime.ranks import communicates
from planner.runtime.step import DEFAULT_STAGES, Recapture, make_step
from planner.tracer.capture import one_at_a_time
from planner.tracer.joint import Joint
from planner.tracer.loss import Loss
from planner.tracer.lower import lower
from planner.tracer.real_layouts import capture
from planner.verification.measured import measured, measured_within, noted
from planner.verification.verify import verify

Budget = int | str | float
SWITCHED_OFF = "switched off by check=False"
COMMUNICATES = "it communicates: a rank that plans alone would wait for the others for ever"


def plan(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    reserve: int | str = 0,
    costs: str = "measure",
    effort: float = 10.0,
    time_limit_s: float | None = None,
    num_stages: int = DEFAULT_STAGES,
    progress: bool = True,
    strict: bool = False,
    opaque: Collection[str] = (),
    dynamic: bool = False,
    device: str | DeviceModel | None = None,
    optimizer: Optimizer | None = None,
    master_weights: bool = False,
    compile: bool = False,
    also: Sequence[tuple[Sequence[Any], Mapping[str, Any]]] = (),
    audit: bool = True,
    check: bool = True,
    criterion: Criterion | None = None,
    criterion_args: Sequence[Any] | None = None,
) -> CheckpointedModule:
    """The model, with its training step checkpointed so that it fits a budget. Results do not change.

    Args:
        model: in training mode, on the device it trains on. It is left as it is; the returned module shares its tensors.
        budget: bound on everything live on the device during forward and backward, parameters and `reserve` included. Bytes
            (int), text ("6GiB"), or a float in (0, 1]: fraction of the plain step's peak.
        args, kwargs: an example call, as in training: `model(*args, **kwargs)`.
        loss: which output backward starts from: its name ("loss"), its position, or a function of the output. Default: the
            output's `.loss` or ["loss"], else its only scalar that requires grad and depends on every parameter that an output
            depends on, else every output that requires grad.
        reserve: bytes set aside within the budget.
        costs: "measure" runs each distinct kernel on the device (cached on disk); "estimate" computes times.
        effort: for the solver, in units of about a second of one core, counted and not timed: the same call gives the same
            plan on a busy machine and on every rank. The best plan found by then is taken.
        time_limit_s: wall seconds for the solver (default: many times the effort). A plan that the clock ended says so.
        num_stages: in how many parts the backward returns gradients, at most.
        progress: show a bar on stderr for stages that take more than a second.
        strict: a training call that is not the one planned for raises PlanMissError, instead of running unplanned.
        opaque: qualified names of submodules to run as they are, besides those found not to be capturable (LSTM kernels,
            hooks, ...). They are measured on the example call: where their memory depends on the data, the peak does too.
        dynamic: hold for inputs of every size up to the planned one, too: plan for the largest batch and length. A step of
            a new size is captured when it first comes (seconds), and runs unplanned where its graph is another one.
        device: plan for a device that is not here: a name such as "H100-80GB" (see `planner.devices`), or a DeviceModel. Model
            and inputs may be on the meta device. Kernels are those that torch runs there, their times are estimated, and
            workspace is hardly known. The module returned trains unplanned: save its plan, and `apply` it on the device.
        optimizer: set its state aside, too: a name of torch.optim ("adamw"), or what makes one of a list of parameters.
        master_weights: set float32 copies of narrower trained parameters aside, too, and optimizer state for these.
        compile: let inductor compile the planned step (minutes). Results then equal eager's but for rounding. That fused
            kernels keep the budget is only measured, by the check.
        check: run one planned step at the end: that it runs, that its outputs look as captured, its measured peak, and, on a
            CPU with memory for a plain step, its bits. Where it needs more than the budget, plan again for less. The plan
            says what was measured, or why no step was run.
            (On a CPU, a budget that is a fraction of an estimate holds for estimates; the plan then says what it needs.)
        also: other calls to plan for within the budget, as (args, kwargs): other shapes, other arguments, inputs that require
            grad beside inputs that do not (a discriminator's): `also=[((x.detach().requires_grad_(),), {})]`.
        audit: at the 2nd, 10th, 100th, 1000th, ... planned call, run the original forward beside the planned one from the same
            state, and compare results and state bit by bit. Where they differ, twice alike, the model trains unplanned
            from then on, with a warning (PlanAuditError where `strict`).
        criterion: a loss outside of the model, to be planned with it: a function or an nn.Module, called as
            `criterion(output, *criterion_args)`. The planned module is then called
            `loss, output = planned(*args, criterion_args=(y,), **kwargs)`; without criterion_args it returns the output. Its
            parameters, buffers and state_dict are the model's alone.
        criterion_args: an example of what the loss takes beside the output, such as (targets,).

    On a CPU the step of the check runs in a forked child process, and nothing of it reaches this one. On a CUDA device, and
    where inductor compiles it, it runs thrice on a copy that shares the parameters' memory (what CUDA's allocator allocates
    depends on the blocks it has at hand). Hooks of parameters do not run in it.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: no schedule fits; carries the floor.
        NoScheduleFoundError: none was found with this effort.
        CompileError: inductor cannot compile it, or what it makes of it exceeds the budget.
        MeasuredPeakError: planned for ever less, the step was still measured to need more than the budget.
        PlanCheckError: the planned step fails, or gives other bits. This is a fault of the planner.
    """
    arguments.check_model(model)
    arguments.check_call(args, kwargs)
    arguments.check_flags(strict=strict, dynamic=dynamic, check=check, audit=audit)
    limits, num_stages = arguments.limits(effort, time_limit_s), arguments.count(num_stages, "num_stages")
    units.check_budget(budget)
    names = arguments.names(opaque)
    model, kwargs, loss, opaque = with_criterion(model, kwargs, loss, names, criterion, criterion_args)
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights, compile)
    one = partial(
        _plan_call,
        model,
        options=options,
        limits=limits,
        num_stages=num_stages,
        recapture=Recapture(options.loss, tuple(options.opaque)) if dynamic else None,
        strict=strict,
        check=check,
        audit=audit,
    )
    with one_at_a_time():
        planned = one(budget, args, kwargs)
        planned.alternatives.extend(one(planned.plan.budget_bytes, *call) for call in also)
    return planned


def _plan_call(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    options: Options,
    limits: Limits,
    num_stages: int,
    recapture: Recapture | None,
    strict: bool,
    check: bool,
    audit: bool,
) -> CheckpointedModule:
    """The planned module for one call; see `plan`."""
    priced = price(model, args, kwargs, options)
    budget_bytes = options.budget_bytes(budget, priced.plain_bytes)
    fraction = float(budget) if units.is_fraction(budget) else None

    def within(aim_bytes: int) -> CheckpointedModule:
        with stage("solve", options.progress):
            made = priced.plan(aim_bytes, limits)
        made = replace(made, budget_bytes=budget_bytes, margin_bytes=made.margin_bytes + budget_bytes - aim_bytes)
        step = make_step(made, priced.joint, model, args, kwargs, num_stages, recapture, options.compile, fraction)
        return CheckpointedModule(model, step, made, strict, audits=audit)

    try:
        reason = "the device is not here" if priced.joint.absent_device else "" if check else SWITCHED_OFF
        reason = reason or (COMMUNICATES if communicates(priced.joint) else "")
        if reason:
            return noted(within(budget_bytes), f"{NOT_RUN}: {reason}")
        if fraction is not None and priced.provenance.is_estimated and not options.compile and priced.is_on_cpu:
            return measured(within(budget_bytes), args, kwargs, progress=options.progress)
        return measured_within(budget_bytes, within, args, kwargs, progress=options.progress)
    except (InfeasibleBudgetError, NoScheduleFoundError) as error:
        raise priced.refusal(error, budget, budget_bytes, limits) from None


def apply(
    plan: Plan,
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    num_stages: int = DEFAULT_STAGES,
    strict: bool = False,
    opaque: Collection[str] = (),
    dynamic: bool = False,
    compile: bool = False,
    check: bool = True,
    criterion: Criterion | None = None,
    criterion_args: Sequence[Any] | None = None,
) -> CheckpointedModule:
    """Rewrite `model` by a plan made before, without profiling or solving; arguments are as for `planner.plan`.

    Raises:
        PlanFileError: the model's graph is not the one the plan was made for; names the first difference.
        CompileError: inductor cannot compile it, or makes of it what needs more than the plan's budget.
        MeasuredPeakError: the step needs more than the plan's budget here.
        PlanCheckError: the planned step fails. This is a fault of the planner.
    """
    arguments.check_plan(plan, Plan)
    arguments.check_model(model)
    arguments.check_call(args, kwargs)
    arguments.check_flags(strict=strict, dynamic=dynamic, compile=compile, check=check)
    num_stages, loss, opaque = arguments.count(num_stages, "num_stages"), arguments.loss_choice(loss), arguments.names(opaque)
    model, kwargs, loss, opaque = with_criterion(model, kwargs, loss, opaque, criterion, criterion_args)
    with one_at_a_time():
        plan, joint = captured_for(plan, model, args, kwargs, loss, opaque)
        recapture = Recapture(loss, tuple(opaque)) if dynamic else None
        step = make_step(plan, joint, model, args, kwargs, num_stages, recapture, compile)
        planned = CheckpointedModule(model, step, plan, strict)
        if not check or communicates(joint):
            return noted(planned, f"{NOT_RUN}: {SWITCHED_OFF if not check else COMMUNICATES}")
        limit = max(plan.budget_bytes, plan.measured_bytes or 0)  # where it was made it was known to need that
        return measured_within(limit, lambda _: planned, args, kwargs, tries=1)


def captured_for(
    plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, loss: Loss, opaque: Collection[str]
) -> tuple[Plan, Joint]:
    """The plan under the names of the model's joint graph, and that graph, which is the one that the plan was made for.

    Where it communicates, the plan may be another rank's: kernels' arguments may then differ.

    Raises:
        PlanFileError: it is not.
    """
    joint = capture(model, args, kwargs, loss=loss, opaque=opaque)
    graph = lower(joint)
    _check_same(plan, graph, arguments=not communicates(joint))
    return replace(plan, graph=renamed(plan.graph, graph)), joint


def sweep(
    model: nn.Module,
    budgets: Sequence[Budget] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 20,
    low: Budget | None = None,
    high: Budget | None = None,
    loss: Loss = None,
    reserve: int | str = 0,
    costs: str = "measure",
    effort: float = 4.0,
    time_limit_s: float | None = None,
    progress: bool = True,
    opaque: Collection[str] = (),
    device: str | DeviceModel | None = None,
    optimizer: Optimizer | None = None,
    master_weights: bool = False,
) -> Sweep:
    """What the model's training step costs at many budgets: one capture, one profile, one solver.

    Args:
        model, args, kwargs, loss, reserve, costs, progress, opaque, device, optimizer, master_weights: as for `plan`.
        budgets: a list of budgets, each as for `plan`. Default: a range.
        points: how many budgets the range has, at equal distances.
        low, high: its ends; by default the lowest peak that a short search reaches, and the plain step's peak.
        effort, time_limit_s: for the solver, for all budgets together; see `plan`.

    Returns:
        the Sweep; it keeps hold of the model and of the call, for `Sweep.verify`.

    Raises:
        BudgetError: an empty or impossible range: not positive, NaN, low above high, above the plain step's peak.
        InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError, NoScheduleFoundError: not one of the budgets has a plan.
    """
    arguments.check_model(model)
    arguments.check_call(args, kwargs)
    limits = arguments.limits(effort, time_limit_s)
    check_budgets(budgets, points, low, high)
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights)
    with one_at_a_time():
        priced = price(model, args, kwargs, options)
        with stage("solve", progress):
            swept = sweep_graph(
                priced.graph,
                budgets,
                points=points,
                low=low,
                high=high,
                margin=lambda budget_bytes: allocator_margin(priced.graph, budget_bytes),
                limits=limits,
                provenance=priced.provenance,
            )
    return Sweep.of(swept, None if options.elsewhere else partial(_measured_point, model, priced.joint, args, kwargs))


def _measured_point(
    model: nn.Module, joint: Joint, args: Sequence[Any], kwargs: Mapping[str, Any] | None, made: Plan, rounds: int
) -> Measured:
    """One of a sweep's plans, run on the side."""
    planned = CheckpointedModule(model, make_step(made, joint, model, args, kwargs, DEFAULT_STAGES), made)
    report = verify(planned, args, kwargs, rounds=rounds)
    return Measured(made.budget_bytes, report.measured_peak_bytes, report.time_ratio, report.exact)


def _check_same(plan: Plan, captured: Graph, *, arguments: bool) -> None:
    """Raise PlanFileError unless the plan is of the captured graph; `arguments`: kernels' arguments are compared, too."""
    if not has_kernels(plan.graph):
        raise PlanFileError(
            "the plan does not say which kernels it was made for (a file of an earlier release, schema 1): it can be shown, "
            "explained and solved again, not applied. Make it again with planner.plan."
        )
    if fingerprint(plan.graph, arguments=arguments) == fingerprint(captured, arguments=arguments):
        return
    made = plan.provenance.torch if plan.provenance is not None else "unknown"
    versions = "" if made == torch.__version__ else f" The plan was made with torch {made}, this is {torch.__version__}."
    raise PlanFileError(
        f"the plan was made for another model or call: {first_difference(plan.graph, captured)}.{versions} Make it again."
    )
