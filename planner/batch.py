"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from planner.analysis.measured import time_step
from planner.api import captured_for
from planner.errors import BudgetError, InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.plan import Plan
from planner.priced import Options, Priced, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.batches import MaxBatch, Measured, Tried
from planner.report.progress import stage
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import DEFAULT_STAGES, make_step
from planner.solver.floor import floor
from planner.tracer.capture import Loss

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]
"""A batch's call: `args, kwargs = make_inputs(batch)`."""

_BASIS = (2, 3)
"""Larger batches are foreseen from these: the first may be a special case, sizes of 1 are."""
_MOST = 2**40


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
    trials = _Trials(make_inputs, model, options, options.budget_bytes(budget, 0), time_limit_s)
    tried = search(trials.attempt, trials.plain_ahead, trials.plan_ahead, trials.budget_bytes)
    return MaxBatch(trials.budget_bytes, tried, trials.measure if options.target is None else None)


@dataclass(frozen=True, slots=True)
class _Trials:
    """What `search` asks of a model."""

    make_inputs: MakeInputs
    model: nn.Module
    options: Options
    budget_bytes: int
    time_limit_s: float
    steps: dict[int, Priced] = field(default_factory=dict)
    """The steps of small batches, of which those of larger ones are foreseen."""

    def attempt(self, batch: int) -> Tried:
        """Capture and plan a batch."""
        step = price(self.model, *self._call(batch), self.options)
        if batch in _BASIS:
            self.steps[batch] = step
        plan: Plan | None = None
        error: InfeasibleBudgetError | NoScheduleFoundError | None = None
        with stage(f"solve for batch {batch}", self.options.progress):
            try:
                plan = step.plan(self.budget_bytes, self.time_limit_s)
            except (InfeasibleBudgetError, NoScheduleFoundError) as missed:
                error = missed
        return Tried(batch, floor(step.graph)[0], step.plain_bytes, plan, error)

    def plain_ahead(self, batch: int) -> bool:
        """Whether a batch's plain step is likely to fit."""
        step = self._ahead(batch)
        return step is not None and step.plain_bytes <= self.budget_bytes

    def plan_ahead(self, batch: int) -> bool:
        """Whether a batch is likely to have a plan."""
        step = self._ahead(batch)
        with stage(f"look ahead to batch {batch}", self.options.progress):
            try:
                return step is not None and bool(step.plan(self.budget_bytes, self.time_limit_s / 2))
            except (InfeasibleBudgetError, NoScheduleFoundError):
                return False

    def measure(self, tried: Tried, rounds: int) -> Measured:
        """Run a batch's planned step, whatever its peak turns out to be."""
        assert tried.plan is not None
        args, kwargs = self._call(tried.batch)
        joint = captured_for(tried.plan, self.model, args, kwargs, self.options.loss, self.options.opaque)
        step = make_step(tried.plan, joint, self.model, args, kwargs, DEFAULT_STAGES)
        planned = CheckpointedModule(self.model, step, tried.plan)
        return Measured(*time_step(planned, args, kwargs, rounds=rounds))

    def _ahead(self, batch: int) -> Priced | None:
        smaller, larger = (self.steps[size] for size in _BASIS)
        graph = grown(smaller.graph, larger.graph, batch - _BASIS[0])
        return None if graph is None else replace(larger, graph=graph)

    def _call(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = self.make_inputs(batch)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
            kind = type(made).__name__
            raise InputError(f"make_inputs({batch}) must return (args, kwargs), such as ((x,), {{}}), not a {kind}")
        return tuple(made[0]), dict(made[1])


def search(
    attempt: Callable[[int], Tried],
    plain_ahead: Callable[[int], bool],
    plan_ahead: Callable[[int], bool],
    budget_bytes: int,
) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Where to look is foreseen; what is found was attempted: the batch above the largest has no plan.

    Args:
        attempt: captures and plans a batch.
        plain_ahead: whether a batch's plain step is likely to fit, told without capturing it, once 1, 2 and 3 were attempted.
        plan_ahead: whether it is likely to have a plan, likewise.
        budget_bytes: what plain peaks are compared with.

    Raises:
        InfeasibleBudgetError, NoScheduleFoundError: batch 1 has no plan.
        InputError: there is no end.
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
            likely = _boundary(plain_ahead, 3, 4)
            plain = _boundary(lambda batch: at(batch).plain_bytes <= budget_bytes, 3, likely)
        known = max(3, plain)
        likely = _boundary(plan_ahead, known, known + 1)
        largest = _boundary(lambda batch: at(batch).plan is not None, known, likely)
        if largest - plain > 2:
            at((plain + largest) // 2)  # throughput may be best between the two
    return tuple(tried[batch] for batch in sorted(tried))


def _boundary(holds: Callable[[int], bool], low: int, guess: int) -> int:
    """The largest batch that holds; `low` does. From the guess in growing strides, then by halving.

    Raises:
        InputError: there is none.
    """
    high, stride = max(low + 1, guess), 1
    if holds(high):
        while holds(high):
            low, high, stride = high, high + stride, 2 * stride
            if high > _MOST:
                raise InputError(f"a batch of {low} still fits: make_inputs(batch) must make inputs of `batch` samples")
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
