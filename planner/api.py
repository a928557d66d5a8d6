"""profile, plan, apply, sweep, estimate: the whole story on a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import nn

from planner import units
from planner.analysis.budgets import Budget, check_budgets
from planner.captured import captured
from planner.estimated import estimated
from planner.options import ApplyKeywords, EstimateKeywords, PlanKeywords, SweepKeywords, read_options, with_options
from planner.profiled import ProfiledStep, profiled
from planner.results.estimate import Estimate
from planner.results.plan import Plan, as_plan
from planner.results.sweep import Sweep
from planner.runtime.module import CheckpointedModule


@with_options(PlanKeywords)
def profile(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[PlanKeywords]
) -> ProfiledStep:
    """Capture one training step of a model, and find the bytes and the time of each of its kernels.

    Args:
        model: in training mode, on the device it trains on. It is left as it is.
        args, kwargs: an example call, as in training: `model(*args, **kwargs)`.
        options: see below; those of the solver and of the planned module are for the step's methods.

    Returns:
        the ProfiledStep, with `plan(budget)`, `sweep()`, `explain(budget)` and `apply(plan)`; it keeps the model and the call.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
    """
    return profiled(model, args, kwargs, read_options(options, PlanKeywords, "profile"))


@with_options(PlanKeywords)
def plan(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[PlanKeywords],
) -> CheckpointedModule:
    """The model, with its training step checkpointed so that it fits a budget. Results do not change.

    Args:
        model: in training mode, on the device it trains on. It is left as it is; the returned module shares its tensors.
        budget: bound on everything live on the device during forward and backward, parameters and `reserve` included. Bytes
            (int), text ("6GiB"), or a fraction of the plain step's peak (0.6 or "60%").
        args, kwargs: an example call, as in training: `model(*args, **kwargs)`.
        options: see below.

    On a CPU the step of the check runs in a forked child process, and nothing of it reaches this one. On a CUDA device, and
    where inductor compiles it, it runs thrice on a copy that shares the parameters' memory (what CUDA's allocator allocates
    depends on the blocks it has cached). Hooks of parameters do not run in it.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: no schedule fits; carries the floor, as `floor_bytes`.
        NoScheduleFoundError: none was found with this effort; carries the lowest peak that was found, as `lowest_bytes`.
        CompileError: inductor cannot compile it, or what it makes of it exceeds the budget.
        MeasuredPeakError: planned for ever less, the step was still measured to need more than the budget.
        PlanCheckError: the planned step fails, or gives other bits. This is a fault of the planner.
    """
    checked = read_options(options, PlanKeywords, "plan")
    units.check_budget(budget)
    return profiled(model, args, kwargs, checked).plan(budget)


@with_options(ApplyKeywords)
def apply(
    plan: Plan | str | os.PathLike[str],
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[ApplyKeywords],
) -> CheckpointedModule:
    """Rewrite a model by a plan made before, without profiling or solving.

    Args:
        plan: made for this model and call, here or elsewhere; or the name of the file that it was saved in.
        model, args, kwargs: as for `planner.plan`.
        options: see below.

    Raises:
        InputError, CaptureError: what was given cannot be planned; says why.
        PlanFileError: the file cannot be read, or the model's graph is not the one the plan was made for; names the first
            difference.
        CompileError: inductor cannot compile it, or makes of it what needs more than the plan's budget.
        MeasuredPeakError: the step needs more than the plan's budget here.
        PlanCheckError: the planned step fails, or gives other bits. This is a fault of the planner.
    """
    checked = read_options(options, ApplyKeywords, "apply")
    made = as_plan(plan)
    return captured(model, args, kwargs, checked).apply(made)


@with_options(SweepKeywords)
def sweep(
    model: nn.Module,
    budgets: Sequence[Budget] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 20,
    low: Budget | None = None,
    high: Budget | None = None,
    **options: Unpack[SweepKeywords],
) -> Sweep:
    """What the model's training step costs at many budgets: one capture, one profile, one solver.

    Args:
        model, args, kwargs: as for `planner.plan`.
        budgets: a list of budgets, each as for `planner.plan`. Default: a range.
        points: how many budgets the range has, at equal distances.
        low, high: its ends; by default the lowest peak that a short search reaches, and the plain step's peak.
        options: see below.

    Returns:
        the Sweep; it keeps the model and the call, for `Sweep.verify`. To train with one of its plans without a second capture,
        use `step = profile(...)`, `swept = step.sweep()`, `step.apply(swept.knee)`.

    Raises:
        BudgetError: an empty or impossible range: not positive, NaN, low above high, above the plain step's peak.
        InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError, NoScheduleFoundError: not one of the budgets has a plan.
    """
    checked = read_options(options, SweepKeywords, "sweep")
    check_budgets(budgets, points, low, high)
    return profiled(model, args, kwargs, checked).sweep(budgets, points=points, low=low, high=high)


@with_options(EstimateKeywords)
def estimate(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory: int | str | None = None,
    autocast: str | None = None,
    remedies: bool = True,
    **options: Unpack[EstimateKeywords],
) -> Estimate:
    """Whether a training step fits into a device's memory, what takes it, and what would help. Nothing runs on the device.

    With `device` nothing is allocated, and model and call may be on the meta device. A model that has data runs one forward,
    as for `planner.plan`. Without `device` the step is for this machine, and its kernels are measured as for `planner.plan`;
    costs='estimate' runs none.

    Args:
        model, args, kwargs: as for `planner.plan`.
        memory: what the step may take, in bytes or as text ("22GiB"). Default: the device's memory, less what the driver and a
            CUDA context take; on a CPU the machine's memory.
        autocast: "bfloat16" or "float16": the forward runs under autocast on the device, as in mixed precision training.
        remedies: also capture the step in bfloat16 to say what that would save.
        options: see below.

    Returns:
        the Estimate: peak and margin, its parts, the floor, the plan for the memory, what else would help.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be captured; says why.
    """
    checked = read_options(options, EstimateKeywords, "estimate")
    return estimated(model, args, kwargs, checked, memory=memory, autocast=autocast, remedies=remedies)
