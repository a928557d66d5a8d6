"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from planner import arguments
from planner.api import captured_for
from planner.errors import BudgetError, CaptureError, InfeasibleBudgetError, InputError, NoScheduleFoundError, PlannerError
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.structure import renamed, wiring
from planner.limits import Limits
from planner.log import PLANNER
from planner.priced import Options, Priced, price
from planner.profiler.estimate import DeviceModel
from planner.profiler.optimizer import Optimizer
from planner.report.progress import stage
from planner.results.max_batch import MaxBatch, Measured, Tried
from planner.results.plan import Plan
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import DEFAULT_STAGES, make_step
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import calls_users_code, concerns_model
from planner.tracer.loss import Loss
from planner.tracer.refusal import own_words
from planner.units import is_fraction, kind, shown
from planner.verification.measured import time_step

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]
"""A batch's call: `args, kwargs = make_inputs(batch)`."""

_SMALLEST = 4
"""The largest batch that a search may begin with, where the model cannot run smaller ones."""
_MOST = 2**40


def max_batch(
    make_inputs: MakeInputs,
    model: nn.Module,
    budget: int | str,
    *,
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
) -> MaxBatch:
    """The largest batch that fits a budget, its plan, and the throughput of the batches looked at on the way.

    Each batch tried is captured anew, without running the step; bytes grow evenly with the batch, so few are tried. The batch
    above the one returned was tried too and has no plan: proven, or none was found with the effort given; `print` says which.

    Args:
        make_inputs: `args, kwargs = make_inputs(batch)`, a training call of so many samples.
        model, loss, reserve, costs, progress, opaque, device, optimizer, master_weights: as for `planner.plan`.
        budget: bytes, or text such as "6GiB".
        effort, time_limit_s: for the solver, at each batch; see `planner.plan`.

    Returns:
        a MaxBatch, which unpacks as `batch, plan`, prints as a table, and measures with `verify`.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: not even the smallest batch that the model can run fits; carries its floor.
        NoScheduleFoundError: for that batch none was found with the effort given.
    """
    arguments.check_function(make_inputs, "make_inputs", "args, kwargs = make_inputs(batch)")
    arguments.check_model(model)
    limits = arguments.limits(effort, time_limit_s)
    if is_fraction(budget):
        raise BudgetError(f"budget {shown(budget)}: a fraction of which batch's peak? Give bytes, or text such as '6GiB'")
    options = Options(loss, reserve, costs, opaque, progress, device, optimizer, master_weights)
    trials = _Trials(make_inputs, model, options, options.budget_bytes(budget, 0), limits)
    with one_at_a_time():
        first, smaller = trials.first()
        try:
            tried = search(trials.attempt, trials.plain_ahead, trials.plan_ahead, trials.budget_bytes, first)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            refusal = trials.step(first).refusal(error, budget, trials.budget_bytes, limits)
            refusal.args = (_smallest_does_not_fit(first, refusal),)
            raise refusal from None
    return MaxBatch(trials.budget_bytes, tried, trials.measure if options.target is None else None, smaller)


@dataclass(frozen=True, slots=True)
class _Trials:
    """What `search` asks of a model."""

    make_inputs: MakeInputs
    model: nn.Module
    options: Options
    budget_bytes: int
    limits: Limits
    steps: dict[int, Priced] = field(default_factory=dict)
    """The steps of small batches, from which those of larger ones are extrapolated."""

    def first(self) -> tuple[int, str]:
        """The smallest batch that the model can run in training, and why smaller ones cannot (batch norm raises for one).

        Raises:
            CaptureError: none of the first few can be captured; the error of a single sample.
        """
        errors: list[CaptureError] = []
        for batch in range(1, _SMALLEST + 1):
            try:
                self.step(batch)
            except CaptureError as error:
                if errors and str(error) == str(errors[-1]):
                    break  # it is not the batch
                errors.append(error)
            else:
                return batch, str(errors[-1]) if errors else ""
        raise errors[0]

    def step(self, batch: int) -> Priced:
        """Capture and price a batch; small ones are kept."""
        if batch in self.steps:
            return self.steps[batch]
        step = price(self.model, *self._call(batch), self.options)
        if batch <= _SMALLEST + 1:
            self.steps[batch] = step
        return step

    def attempt(self, batch: int) -> Tried:
        """Capture and plan a batch."""
        step = self.step(batch)
        plan: Plan | None = None
        error: InfeasibleBudgetError | NoScheduleFoundError | None = None
        with stage(f"solve for batch {batch}", self.options.progress):
            try:
                plan = step.plan(self.budget_bytes, self.limits)
            except (InfeasibleBudgetError, NoScheduleFoundError) as missed:
                error = missed
        PLANNER.info("batch %d: %s", batch, error or "planned")
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
                return step is not None and bool(step.plan(self.budget_bytes, self.limits.share(1 / 2)))
            except (InfeasibleBudgetError, NoScheduleFoundError):
                return False

    def measure(self, tried: Tried, rounds: int) -> Measured:
        """Run a batch's planned step, even where its peak turns out to be above the budget."""
        assert tried.plan is not None
        args, kwargs = self._call(tried.batch)
        plan, joint = captured_for(tried.plan, self.model, args, kwargs, self.options.loss, self.options.opaque)
        step = make_step(plan, joint, self.model, args, kwargs, DEFAULT_STAGES)
        planned = CheckpointedModule(self.model, step, plan)
        return Measured(*time_step(planned, args, kwargs, rounds=rounds))

    def _ahead(self, batch: int) -> Priced | None:
        # the first may be a special case: sizes of 1 are
        size = max(2, min(self.steps))
        smaller, larger = self.steps[size], self.steps[size + 1]
        graph = grown(smaller.graph, larger.graph, batch - size)
        return None if graph is None else replace(larger, graph=graph)

    @calls_users_code
    def _call(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            made = self.make_inputs(batch)
        except PlannerError:
            raise
        except Exception as error:
            if not concerns_model(error):
                raise
            raise InputError(f"make_inputs({batch}) {own_words(error)}") from error
        if not isinstance(made, tuple) or len(made) != 2:
            raise InputError(f"make_inputs({batch}) must return (args, kwargs), such as ((x,), {{}}), not {kind(made)}")
        arguments.check_call(*made)
        return tuple(made[0]), dict(made[1] or {})


def search(
    attempt: Callable[[int], Tried],
    plain_ahead: Callable[[int], bool],
    plan_ahead: Callable[[int], bool],
    budget_bytes: int,
    first: int = 1,
) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Where to look is extrapolated; what is found was planned: the batch above the largest has no plan.

    Args:
        attempt: captures and plans a batch.
        plain_ahead: whether a batch's plain step is likely to fit, told without capturing it, once the first three were tried.
        plan_ahead: whether it is likely to have a plan, likewise.
        budget_bytes: what plain peaks are compared with.
        first: the smallest batch.

    Raises:
        InfeasibleBudgetError, NoScheduleFoundError: the smallest batch has no plan.
        InputError: there is no end.
    """
    tried: dict[int, Tried] = {}

    def at(batch: int) -> Tried:
        if batch not in tried:
            tried[batch] = attempt(batch)
        return tried[batch]

    error = at(first).error
    if error is not None:
        error.args = (_smallest_does_not_fit(first, error),)
        raise error
    second, third = first + 1, first + 2
    if at(second).plan is not None and at(third).plan is not None:
        plain = max((batch for batch in (first, second, third) if at(batch).plain_bytes <= budget_bytes), default=0)
        if plain == third:
            likely = _boundary(plain_ahead, third, third + 1)
            plain = _boundary(lambda batch: at(batch).plain_bytes <= budget_bytes, third, likely)
        known = max(third, plain)
        likely = _boundary(plan_ahead, known, known + 1)
        largest = _boundary(lambda batch: at(batch).plan is not None, known, likely)
        if largest - plain > 2:
            at((plain + largest) // 2)  # throughput may be best between the two
    return tuple(tried[batch] for batch in sorted(tried))


def _smallest_does_not_fit(batch: int, error: Exception) -> str:
    which = "one sample" if batch == 1 else f"the smallest batch that the model can run, {batch},"
    return f"{which} does not fit: {error}"


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
    if wiring(smaller) != wiring(larger):
        return None
    smaller = renamed(smaller, larger)

    def at(first: int, second: int) -> int:
        return max(0, first + times * (second - first))

    values = (replace(v, nbytes=at(smaller.value[v.name].nbytes, v.nbytes)) for v in larger.values)
    ops = (
        replace(b, cost_ns=at(a.cost_ns, b.cost_ns), workspace_bytes=at(a.workspace_bytes, b.workspace_bytes))
        for a, b in zip(smaller.ops, larger.ops, strict=True)
    )
    return replace(larger, values=tuple(values), ops=tuple(ops))
