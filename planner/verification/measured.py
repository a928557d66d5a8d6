"""Measured peaks and times of planned steps; plans are made again for less where the step needs more than the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.errors import CompileError, InfeasibleBudgetError, MeasuredPeakError, NoScheduleFoundError, warn
from planner.graph.planned import NOT_RUN, RUN
from planner.log import VERIFICATION
from planner.report.progress import stage
from planner.runtime.module import CheckpointedModule
from planner.tracer.capture import one_at_a_time, running_steps
from planner.units import enough_text, format_bytes
from planner.verification.check_step import NotRunError, run_step
from planner.verification.step_copy import CopyError, StepCopy, check_call, copy_of


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps that were run: seconds of each, and the peak in bytes with everything resident."""

    seconds: tuple[float, ...]
    peak_bytes: int


def time_steps(
    planned: CheckpointedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, rounds: int = 3
) -> StepTimes:
    """Run `rounds` planned steps after one for warming up.

    With one CPU thread their times are CPU time, in which other processes hardly show; else they are by the wall clock. The
    steps run on a copy that shares the parameters' memory, so that it fits where the plan fits. The model's gradients, hooks
    and buffers are not touched; the random generator is restored.

    Raises:
        InputError: the call is not the one planned for, or the model cannot be copied, or its copy does not run planned.
    """
    call = check_call(planned, args, kwargs, "a step can be measured for")
    step_copy = StepCopy(copy_of(planned, sharing=True), planned, call)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.random.fork_rng(devices=[planned.device] if planned.device.type == "cuda" else []):
        step_copy.run_first_calls()
        step_copy.step()
        peak_bytes = step_copy.peak()
        seconds = [seconds_of(step_copy, planned.device, clock) for _ in range(max(1, rounds))]
    return StepTimes(tuple(seconds), peak_bytes)


def seconds_of(step_copy: StepCopy, device: torch.device, cpu_clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one step: on a CPU by the given clock, on CUDA by the wall clock between two synchronizations."""
    step_copy.prepare()
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else cpu_clock
    if cuda:
        torch.cuda.synchronize(device)
    start = clock()
    step_copy.step()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - start


def step_peak(planned: CheckpointedModule, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Measured peak of a planned step in bytes, everything resident included; see `run_step`.

    Raises:
        NotRunError, CopyError, PlanCheckError: as `run_step`.
    """
    with one_at_a_time(), running_steps():
        return run_step(planned, (tuple(args), dict(kwargs or {})))


def measured_within(
    budget_bytes: int,
    plan: Callable[[int], CheckpointedModule],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tries: int = 3,
    progress: bool = False,
) -> CheckpointedModule:
    """A planned module whose measured peak is within a budget; `plan.measured_bytes` holds it.

    Warns where no step could be run for an unexpected reason.

    Args:
        plan: plans for a budget; called again with the budget lowered by the excess.
        args, kwargs: the call planned for.
        tries: maximum number of plans.
        progress: show a bar on stderr where the step takes more than a second.

    Raises:
        PlanCheckError: the step fails.
        CompileError, MeasuredPeakError: every plan's step needs more than the budget; CompileError where it is compiled.
        InfeasibleBudgetError, NoScheduleFoundError: there is no plan for the budget itself.
    """
    target_bytes, fitting, peak_bytes = budget_bytes, None, None
    for attempt in range(tries):
        try:
            planned = plan(target_bytes)
        except (InfeasibleBudgetError, NoScheduleFoundError):
            if attempt == 0:
                raise
            break
        planned = measured(planned, args, kwargs, progress=progress)
        peak_bytes = planned.plan.measured_bytes
        if peak_bytes is None:
            return planned
        # CUDA: the measured peak varies with the allocator's cached blocks; keep half of (measured - planned) free as well
        excess = max(0, peak_bytes - planned.plan.peak_bytes) // 2 if may_exceed(planned) else 0
        if peak_bytes + excess <= budget_bytes:
            return planned
        fitting = planned if peak_bytes <= budget_bytes else fitting
        target_bytes = planned.plan.peak_bytes - (peak_bytes + excess - budget_bytes)
        sizes = (*map(format_bytes, (planned.plan.peak_bytes, peak_bytes, excess, budget_bytes, target_bytes)),)
        text = "planned for %s, measured %s (and up to %s more), of a budget of %s: %s"
        again = "plan again, for %s" if attempt + 1 < tries else "given up; the next plan would be for %s"
        VERIFICATION.info(text, *sizes[:-1], again % sizes[-1])
    if fitting is not None:
        return fitting
    assert peak_bytes is not None
    raise _over(budget_bytes, peak_bytes, planned)


def measured(
    planned: CheckpointedModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
) -> CheckpointedModule:
    """Run one step, even above the budget; the module's plan then says what it needed, or why none was run.

    Raises:
        PlanCheckError: the step fails.
    """
    try:
        with stage("run one step", progress):
            peak_bytes = step_peak(planned, args, kwargs)
    except (NotRunError, CopyError) as reason:
        if getattr(reason, "expected", False):
            VERIFICATION.info("no step was run: %s", reason)
        else:
            warn(f"whether the step keeps its budget was not measured: {reason}")
        return noted(planned, f"{NOT_RUN}: {reason}")
    VERIFICATION.debug("one planned step was run: measured peak %d bytes, planned %d", peak_bytes, planned.plan.peak_bytes)
    return noted(planned, RUN, peak_bytes)


def noted(planned: CheckpointedModule, check: str, measured_bytes: int | None = None) -> CheckpointedModule:
    """The module, with the result of the check noted in its plan."""
    planned.plan = replace(planned.plan, check=check, measured_bytes=measured_bytes)
    return planned


def may_exceed(planned: CheckpointedModule) -> bool:
    """Whether the measured peak may exceed the planned one: CUDA's allocator returns larger blocks than requested."""
    return planned.device.type == "cuda" and not planned.step.is_compiled


def _over(budget_bytes: int, peak_bytes: int, planned: CheckpointedModule) -> CompileError | MeasuredPeakError:
    """The error for a step that was measured to need more than the budget."""
    needs = f"the step peaks at {format_bytes(peak_bytes)}, more than the budget of {format_bytes(budget_bytes)} "
    needs += f"(its plan: {format_bytes(planned.plan.peak_bytes)})"
    if planned.step.is_compiled:
        return CompileError(f"compiled, {needs}. Plan without compile=True, which keeps the budget")
    # a plan for a larger budget is measured again, and what the allocator adds changes from step to step
    enough = peak_bytes + max(0, peak_bytes - planned.plan.peak_bytes) // 2
    cure = f"Raise the budget to {enough_text(enough)} ({enough} bytes)"
    if planned.plan.is_estimated:
        cure += ", or plan with costs='measure': what kernels need for themselves cannot be estimated"
    elif may_exceed(planned):
        cure += ", or set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, where CUDA's allocator cuts every block to size"
    return MeasuredPeakError(f"{cure}: measured, {needs}", budget_bytes=budget_bytes, peak_bytes=peak_bytes)
