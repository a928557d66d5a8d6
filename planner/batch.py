"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from planner.api import apply
from planner.errors import BudgetError, InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.graph.plan import Plan
from planner.priced import Options, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.batches import MaxBatch, Measured, Tried
from planner.report.progress import stage
from planner.solver.floor import floor
from planner.tracer.capture import Loss
from planner.verification import time_step

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]
"""A batch's call: `args, kwargs = make_inputs(batch)`."""


def max_batch(
    make_inputs: MakeInputs,
    model: nn.Module,
    budget: int | str,
    *,
    loss: Loss = None,
    reserve: int | str = 0,
    costs: str = "measure",
    time_limit_s: float = 4.0,
    progress: bool = True,
    opaque: Collection[str] = (),
    device: str | DeviceModel | None = None,
    optimizer: Optimizer | None = None,
    master_weights: bool = False,
) -> MaxBatch:
    """The largest batch that fits a budget, its plan, and the throughput of the batches looked at on the way.

    Each batch tried is captured anew, without running the step; bytes grow evenly with the batch, so few are tried. The batch
    above the one returned was tried too and has no plan: proven, or none was found in the time given; `print` says which.

    Args:
        make_inputs: `args, kwargs = make_inputs(batch)`, a training call of so many samples.
        model, loss, reserve, costs, progress, opaque, device, optimizer, master_weights: as for `planner.plan`.
        budget: bytes, or text such as "6GiB".
        time_limit_s: for the solver, at each batch.

    Returns:
        a MaxBatch, which unpacks as `batch, plan`, prints as a table, and measures with `verify`.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: not even one sample fits; carries its floor.
        NoScheduleFoundError: for one sample none was found in the time given.
    """
    if isinstance(budget, float):
        raise BudgetError(f"budget {budget!r}: a fraction of which batch's peak? Give max_batch bytes, or text such as '6GiB'")
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights)
    budget_bytes = options.budget_bytes(budget, 0)

    def attempt(batch: int) -> Tried:
        priced = price(model, *_call(make_inputs, batch), options)
        plan: Plan | None = None
        error: InfeasibleBudgetError | NoScheduleFoundError | None = None
        with stage(f"solve for batch {batch}", progress):
            try:
                plan = priced.plan(budget_bytes, time_limit_s)
            except (InfeasibleBudgetError, NoScheduleFoundError) as missed:
                error = missed
        return Tried(batch, floor(priced.graph)[0], priced.plain_bytes, plan, error)

    def measured(tried: Tried, rounds: int) -> Measured:
        assert tried.plan is not None
        args, kwargs = _call(make_inputs, tried.batch)
        planned = apply(tried.plan, model, args, kwargs, loss=loss, opaque=opaque)
        return Measured(*time_step(planned, args, kwargs, rounds=rounds))

    return MaxBatch(budget_bytes, search(attempt, budget_bytes), None if options.elsewhere else measured)


def search(attempt: Callable[[int], Tried], budget_bytes: int) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Floors and plain peaks are taken to grow evenly with the batch, which tells where to look; what is found is what was
    attempted: the batch above the largest has no plan.

    Raises:
        InfeasibleBudgetError, NoScheduleFoundError: batch 1 has no plan.
        InputError: a larger batch needs no more bytes.
    """
    tried: dict[int, Tried] = {}

    def at(batch: int) -> Tried:
        if batch not in tried:
            tried[batch] = attempt(batch)
        return tried[batch]

    first = at(1)
    if first.error is not None:
        first.error.args = (f"one sample does not fit: {first.error}", *first.error.args[1:])
        raise first.error
    if at(2).plan is not None:
        plain = _largest_plain(at, budget_bytes)
        most = _extrapolated(first.floor_bytes, at(2).floor_bytes, budget_bytes)
        largest = _boundary(at, lambda batch: batch.plan is not None, max(2, plain), most, lambda low, high: (low + high) // 2)
        if largest - plain > 2:
            at((plain + largest) // 2)  # throughput may be best between the two
    return tuple(tried[batch] for batch in sorted(tried))


def _extrapolated(bytes_of_1: int, bytes_of_2: int, budget_bytes: int) -> int:
    """The largest batch within the budget, if every sample adds as much as the second."""
    if bytes_of_2 <= bytes_of_1:
        raise InputError(
            f"one sample needs {bytes_of_1} bytes and two need {bytes_of_2}: make_inputs(batch) must make `batch` samples"
        )
    return max(0, 1 + (budget_bytes - bytes_of_1) // (bytes_of_2 - bytes_of_1))


def _largest_plain(at: Callable[[int], Tried], budget_bytes: int) -> int:
    """The largest batch whose plain step fits; 0 where there is none."""

    def between(low: int, high: int) -> int:
        begin, end = at(low).plain_bytes, at(high).plain_bytes
        return low + (budget_bytes - begin) * (high - low) // (end - begin)

    if at(2).plain_bytes > budget_bytes:
        return int(at(1).plain_bytes <= budget_bytes)
    guess = _extrapolated(at(1).plain_bytes, at(2).plain_bytes, budget_bytes)
    return _boundary(at, lambda batch: batch.plain_bytes <= budget_bytes, 2, guess, between)


def _boundary(
    at: Callable[[int], Tried], holds: Callable[[Tried], bool], low: int, guess: int, between: Callable[[int, int], int]
) -> int:
    """The largest batch for which something holds that holds for `low`: from the guess on upwards, else by `between`."""
    high, stride = max(low + 1, guess), 1
    while holds(at(high)):
        low, high, stride = high, high + stride, 2 * stride
    while high - low > 1:
        middle = min(max(between(low, high), low + 1), high - 1)
        low, high = (middle, high) if holds(at(middle)) else (low, middle)
    return low


def _call(make_inputs: MakeInputs, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    made = make_inputs(batch)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
        raise InputError(f"make_inputs({batch}) must return (args, kwargs), such as ((x,), {{}}), not a {type(made).__name__}")
    return tuple(made[0]), dict(made[1])
