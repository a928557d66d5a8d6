"""plan, apply, sweep: the whole story on a page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner import units
from planner.errors import PlanFileError
from planner.graph.graph import Graph
from planner.graph.plan import Plan
from planner.graph.planfile import fingerprint
from planner.priced import Options, allocator_margin, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.budgets import check_budgets
from planner.report.progress import stage
from planner.report.sweep import Measured, Sweep, sweep_graph
from planner.runtime.module import CheckpointedModule
from planner.runtime.ranks import communicates
from planner.runtime.step import DEFAULT_STAGES, Recapture, make_step
from planner.tracer.capture import Loss
from planner.tracer.joint import Joint
from planner.tracer.lower import lower
from planner.tracer.settled import capture
from planner.verification import measured_within, verify

Budget = int | str | float


def plan(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    reserve: int | str = 0,
    costs: str = "measure",
    time_limit_s: float = 10.0,
    num_stages: int = DEFAULT_STAGES,
    progress: bool = True,
    strict: bool = False,
    opaque: Collection[str] = (),
    dynamic: bool = False,
    device: str | DeviceModel | None = None,
    optimizer: Optimizer | None = None,
    master_weights: bool = False,
    compile: bool = False,
) -> CheckpointedModule:
    """The model, with its training step checkpointed so that it fits a budget. Results do not change.

    Args:
        model: in training mode, on the device it trains on. It is left as it is; the returned module shares its tensors.
        budget: bound on everything live on the device during forward and backward, parameters and `reserve` included. Bytes
            (int), text ("6GiB"), or a float in (0, 1]: fraction of the plain step's peak.
        args, kwargs: an example call, as in training: `model(*args, **kwargs)`.
        loss: which output backward starts from (see `planner.tracer.capture`). Default: the output's
            `.loss` or ["loss"], else every output that requires grad.
        reserve: bytes set aside within the budget.
        costs: "measure" runs each distinct kernel on the device (cached on disk); "estimate" computes times.
        time_limit_s: for the solver; the best plan found by then is taken.
        num_stages: in how many parts the backward hands out gradients, at most.
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
            kernels keep the budget is measured, as on CUDA.

    On a CUDA device the planned step is run thrice, on a copy that shares the parameters' memory, and planned again for less
    where it needs more than the budget: what CUDA's allocator hands out depends on the blocks it has at hand. Hooks of modules
    run in it, those of parameters do not.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: no schedule fits; carries the floor.
        NoScheduleFoundError: none was found in the time given.
        CompileError: inductor cannot compile it, or what it makes of it exceeds the budget.
        MeasuredPeakError: on CUDA: planned for ever less, the step was still measured to need more than the budget.
    """
    units.check_budget(budget)
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights, compile)
    priced = price(model, args, kwargs, options)
    budget_bytes = options.budget_bytes(budget, priced.plain_bytes)
    recapture = Recapture(loss, tuple(opaque)) if dynamic else None

    def within(aim_bytes: int) -> CheckpointedModule:
        with stage("solve", progress):
            made = priced.plan(aim_bytes, time_limit_s)
        made = replace(made, budget_bytes=budget_bytes, margin_bytes=made.margin_bytes + budget_bytes - aim_bytes)
        step = make_step(made, priced.joint, model, args, kwargs, num_stages, recapture, compile)
        return CheckpointedModule(model, step, made, strict)

    alone = not communicates(priced.joint)  # a rank that plans alone would wait for the others for ever
    if alone and (compile or (priced.joint.device.type == "cuda" and options.target is None)):
        return measured_within(budget_bytes, within, args, kwargs)
    return within(budget_bytes)


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
) -> CheckpointedModule:
    """Rewrite `model` by a plan made before, without profiling or solving; arguments are as for `planner.plan`.

    Raises:
        PlanFileError: the model's graph is not the one the plan was made for; names the first difference.
        CompileError: inductor cannot compile it, or makes of it what needs more than the plan's budget.
        MeasuredPeakError: on CUDA: the step needs more than the plan's budget there.
    """
    joint = captured_for(plan, model, args, kwargs, loss, opaque)
    recapture = Recapture(loss, tuple(opaque)) if dynamic else None
    step = make_step(plan, joint, model, args, kwargs, num_stages, recapture, compile)
    planned = CheckpointedModule(model, step, plan, strict)
    if (compile or joint.device.type == "cuda") and not communicates(joint):
        return measured_within(plan.budget_bytes, lambda _: planned, args, kwargs, tries=1)
    return planned


def captured_for(
    plan: Plan, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, loss: Loss, opaque: Collection[str]
) -> Joint:
    """The model's joint graph, which is the one that the plan was made for.

    Raises:
        PlanFileError: it is not.
    """
    joint = capture(model, args, kwargs, loss=loss, opaque=opaque)
    _check_same(plan, _with_tickets(lower(joint), plan.graph, joint.tickets))
    return joint


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
    time_limit_s: float = 4.0,
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
        time_limit_s: wall seconds for the solver, for all budgets together.

    Returns:
        the Sweep; it keeps hold of the model and of the call, for `Sweep.verify`.

    Raises:
        BudgetError: an empty or impossible range: not positive, NaN, low above high, above the plain step's peak.
        InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError, NoScheduleFoundError: not one of the budgets has a plan.
    """
    check_budgets(budgets, points, low, high)
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights)
    priced = price(model, args, kwargs, options)

    def measured(made: Plan, rounds: int) -> Measured:
        planned = CheckpointedModule(model, make_step(made, priced.joint, model, args, kwargs, DEFAULT_STAGES), made)
        report = verify(planned, args, kwargs, rounds=rounds)
        return Measured(made.budget_bytes, report.measured_peak_bytes, report.time_ratio, report.exact)

    with stage("solve", progress):
        return sweep_graph(
            priced.graph,
            budgets,
            points=points,
            low=low,
            high=high,
            margin=lambda budget_bytes: allocator_margin(priced.graph, budget_bytes),
            time_limit_s=time_limit_s,
            reorder=priced.is_movable,
            made_on=priced.made_on,
            measure=None if options.elsewhere else measured,
        )


def _with_tickets(captured: Graph, planned: Graph, tickets: Collection[str]) -> Graph:
    """The captured graph, with the bytes that opaque parts held when the plan was made: they may depend on the data."""
    values = tuple(planned.value.get(value.name, value) if value.name in tickets else value for value in captured.values)
    return replace(captured, values=values)


def _check_same(plan: Plan, captured: Graph) -> None:
    if fingerprint(plan.graph) == fingerprint(captured):
        return
    made = dict(plan.made_on).get("torch", "unknown")
    versions = "" if made == torch.__version__ else f" The plan was made with torch {made}, this is {torch.__version__}."
    raise PlanFileError(
        f"the plan was made for another model or call: {_first_difference(plan.graph, captured)}.{versions} Make it again."
    )


def _first_difference(planned: Graph, captured: Graph) -> str:
    sizes = {value.name: value.nbytes - value.hidden_bytes for value in captured.values}
    for ours, theirs in zip(planned.ops, captured.ops, strict=False):
        if (ours.name, ours.reads, ours.writes, ours.recomputable) != (
            theirs.name,
            theirs.reads,
            theirs.writes,
            theirs.recomputable,
        ):
            reads = f" of {', '.join(theirs.reads)}, not of {', '.join(ours.reads)}" if ours.name == theirs.name else ""
            return (
                f"op {ours.name} ({ours.source}) of the plan stands where the model has {theirs.name} ({theirs.source}){reads}"
            )
    if len(planned.ops) != len(captured.ops):
        return f"the plan has {len(planned.ops)} ops, the model {len(captured.ops)}"
    for value in planned.values:
        known = value.nbytes - value.hidden_bytes
        if value.name in sizes and sizes[value.name] != known:
            return f"{value.name} has {known} bytes in the plan and {sizes[value.name]} in the model"
    return "their inputs or outputs differ"
