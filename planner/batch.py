"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from planner.api import apply
from planner.errors import BudgetError, InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.plan import Plan
from planner.priced import Options, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.batches import MaxBatch, Measured, Tried
from planner.report.progress import stage
from planner.solver.floor import floor
from planner.solver.solve import solve
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

    graphs: dict[int, Graph] = {}

    def attempt(batch: int) -> Tried:
        priced = price(model, *_call(make_inputs, batch), options)
        graphs[batch] = priced.graph
        plan: Plan | None = None
        error: InfeasibleBudgetError | NoScheduleFoundError | None = None
        with stage(f"solve for batch {batch}", progress):
            try:
                plan = priced.plan(budget_bytes, time_limit_s)
            except (InfeasibleBudgetError, NoScheduleFoundError) as missed:
                error = missed
        return Tried(batch, floor(priced.graph)[0], priced.plain_bytes, plan, error)

    def foresee(batch: int) -> bool:
        graph = grown(graphs[2], graphs[3], batch - 2)
        if graph is None:
            return False
        with stage(f"look ahead to batch {batch}", progress), suppress(InfeasibleBudgetError, NoScheduleFoundError):
            solve(graph, budget_bytes, time_limit_s=time_limit_s / 2)
            return True
        return False

    def measured(tried: Tried, rounds: int) -> Measured:
        assert tried.plan is not None
        args, kwargs = _call(make_inputs, tried.batch)
        planned = apply(tried.plan, model, args, kwargs, loss=loss, opaque=opaque)
        return Measured(*time_step(planned, args, kwargs, rounds=rounds))

    return MaxBatch(budget_bytes, search(attempt, foresee, budget_bytes), None if options.elsewhere else measured)


def search(attempt: Callable[[int], Tried], foresee: Callable[[int], bool], budget_bytes: int) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Where to look is foreseen; what is found was attempted: the batch above the largest has no plan.

    Args:
        attempt: captures and plans a batch.
        foresee: whether a batch is likely to have a plan, told without capturing it; asked once 1, 2 and 3 were attempted.
        budget_bytes: what plain peaks are compared with.

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
    if at(2).plan is not None and at(3).plan is not None:
        plain = max((batch for batch in (1, 2, 3) if at(batch).plain_bytes <= budget_bytes), default=0)
        if plain == 3:
            likely = _extrapolated(at(2).plain_bytes, at(3).plain_bytes, budget_bytes)
            plain = _boundary(lambda batch: at(batch).plain_bytes <= budget_bytes, 3, likely)
        likely = _boundary(foresee, max(3, plain), _extrapolated(at(2).floor_bytes, at(3).floor_bytes, budget_bytes))
        largest = _boundary(lambda batch: at(batch).plan is not None, max(3, plain), likely)
        if largest - plain > 2:
            at((plain + largest) // 2)  # throughput may be best between the two
    return tuple(tried[batch] for batch in sorted(tried))


def _extrapolated(bytes_of_2: int, bytes_of_3: int, budget_bytes: int) -> int:
    """The largest batch within the budget, if every sample adds as much as the third (the first may be a special case)."""
    if bytes_of_3 <= bytes_of_2:
        raise InputError(
            f"two samples need {bytes_of_2} bytes and three need {bytes_of_3}: make_inputs(batch) must make `batch` samples"
        )
    return 2 + (budget_bytes - bytes_of_2) // (bytes_of_3 - bytes_of_2)


def _boundary(holds: Callable[[int], bool], low: int, guess: int) -> int:
    """The largest batch that holds; `low` does. From the guess in growing strides, then by halving."""
    high, stride = max(low + 1, guess), 1
    if holds(high):
        while holds(high):
            low, high, stride = high, high + stride, 2 * stride
    else:
        while high - stride > low and not holds(high - stride):
            high, stride = high - stride, 2 * stride
        low = max(low, high - stride)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def grown(smaller: Graph, larger: Graph, times: int) -> Graph | None:
    """`smaller` plus so many times its difference to `larger`: the graph of a larger batch. None where they have other ops."""
    rows = [[*((op.name, op.reads, op.writes) for op in g.ops), *(v.name for v in g.values)] for g in (smaller, larger)]
    if rows[0] != rows[1]:
        return None

    def at(first: int, second: int) -> int:
        return max(0, first + times * (second - first))

    values = (replace(v, nbytes=at(smaller.value[v.name].nbytes, v.nbytes)) for v in larger.values)
    ops = (
        replace(b, cost_ns=at(a.cost_ns, b.cost_ns), workspace_bytes=at(a.workspace_bytes, b.workspace_bytes))
        for a, b in zip(smaller.ops, larger.ops, strict=True)
    )
    return replace(larger, values=tuple(values), ops=tuple(ops))


def _call(make_inputs: MakeInputs, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    made = make_inputs(batch)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
        raise InputError(f"make_inputs({batch}) must return (args, kwargs), such as ((x,), {{}}), not a {type(made).__name__}")
    return tuple(made[0]), dict(made[1])
