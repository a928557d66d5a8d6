"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

from torch import nn

from planner import arguments
from planner.captured import captured
from planner.errors import BudgetError, CaptureError, InfeasibleBudgetError, InputError, NoScheduleFoundError, PlannerError
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.structure import renamed, wiring
from planner.log import PLANNER
from planner.options import MaxBatchKeywords, PlanOptions, read_options, with_options
from planner.profiled import ProfiledStep, budget_bytes, profiled
from planner.report.progress import stage
from planner.results.max_batch import MaxBatch, MeasuredBatch, Tried
from planner.results.plan import Plan
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import calls_users_code, concerns_model
from planner.tracer.refusal import own_words
from planner.units import is_fraction, kind, shown
from planner.verification.measured import time_step

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]
"""A batch's call: `args, kwargs = make_inputs(batch)`."""

_LARGEST_FIRST = 4
"""The largest batch that a search may begin with, where the model cannot run smaller ones."""
_MOST = 2**40


@with_options(MaxBatchKeywords)
def max_batch(make_inputs: MakeInputs, model: nn.Module, budget: int | str, **options: Unpack[MaxBatchKeywords]) -> MaxBatch:
    """The largest batch that fits a budget, its plan, and the throughput of the batches tried on the way.

    Each batch tried is captured again, without running the step; bytes grow evenly with the batch, so few are tried. The batch
    above the one returned was tried too and has no plan: proven, or none was found with the effort given; `print` says which.

    Args:
        make_inputs: `args, kwargs = make_inputs(batch)`, a training call with this many samples.
        model: as for `planner.plan`.
        budget: bytes, or text such as "6GiB".
        options: see below; `effort` and `time_limit_s` are for each batch.

    Returns:
        a MaxBatch, which unpacks as `batch, plan`, prints as a table, and measures with `verify`.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: not even the smallest batch that the model can run fits; carries its floor.
        NoScheduleFoundError: for that batch none was found with the effort given; carries the lowest peak that was found.
    """
    checked = read_options(options, MaxBatchKeywords, "max_batch")
    arguments.check_function(make_inputs, "make_inputs", "args, kwargs = make_inputs(batch)")
    arguments.check_model(model)
    if is_fraction(budget):
        raise BudgetError(f"budget {shown(budget)}: a fraction of which batch's peak? Give bytes, or text such as '6GiB'")
    batches = _Batches(make_inputs, model, checked, budget_bytes(budget, 0, checked))
    with one_at_a_time():
        first, smaller = batches.first()
        try:
            tried = search(batches.attempt, batches.plain_probably_fits, batches.probably_has_plan, batches.budget_bytes, first)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            refusal = batches.step(first).refusal(error, budget, batches.budget_bytes)
            refusal.args = (_smallest_does_not_fit(first, refusal),)
            raise refusal from None
    return MaxBatch(batches.budget_bytes, tried, batches.measure if checked.device is None else None, smaller)


@dataclass(frozen=True, slots=True)
class _Batches:
    """A model's training steps by batch, as `search` needs them."""

    make_inputs: MakeInputs
    model: nn.Module
    options: PlanOptions
    budget_bytes: int
    steps: dict[int, ProfiledStep] = field(default_factory=dict)
    """The steps of small batches, from which those of larger ones are extrapolated."""

    def first(self) -> tuple[int, str]:
        """The smallest batch that the model can run in training, and why smaller ones cannot (batch norm raises for one).

        Raises:
            CaptureError: none of the first few can be captured; the error of a single sample.
        """
        errors: list[CaptureError] = []
        for batch in range(1, _LARGEST_FIRST + 1):
            try:
                self.step(batch)
            except CaptureError as error:
                if errors and str(error) == str(errors[-1]):
                    break  # it is not the batch
                errors.append(error)
            else:
                return batch, str(errors[-1]) if errors else ""
        raise errors[0]

    def step(self, batch: int) -> ProfiledStep:
        """Capture and profile a batch; small ones are kept."""
        if batch in self.steps:
            return self.steps[batch]
        step = profiled(self.model, *self._call(batch), self.options)
        if batch <= _LARGEST_FIRST + 1:
            self.steps[batch] = step
        return step

    def attempt(self, batch: int) -> Tried:
        """Capture and plan a batch."""
        step = self.step(batch)
        plan: Plan | None = None
        refusal: InfeasibleBudgetError | NoScheduleFoundError | None = None
        with stage(f"solve for batch {batch}", self.options.progress):
            try:
                plan = step.solved(self.budget_bytes, self.options.limits)
            except (InfeasibleBudgetError, NoScheduleFoundError) as error:
                refusal = error
        PLANNER.info("batch %d: %s", batch, refusal or "planned")
        return Tried(batch, floor(step.graph)[0], step.plain_bytes, plan, refusal)

    def plain_probably_fits(self, batch: int) -> bool:
        """Whether the extrapolated plain step of a batch is within the budget."""
        step = self._extrapolated(batch)
        return step is not None and step.plain_bytes <= self.budget_bytes

    def probably_has_plan(self, batch: int) -> bool:
        """Whether the extrapolated step of a batch has a plan."""
        step = self._extrapolated(batch)
        with stage(f"predict batch {batch}", self.options.progress):
            try:
                return step is not None and bool(step.solved(self.budget_bytes, self.options.limits.share(1 / 2)))
            except (InfeasibleBudgetError, NoScheduleFoundError):
                return False

    def measure(self, tried: Tried, rounds: int) -> MeasuredBatch:
        """Run a batch's planned step, even where its peak turns out to be above the budget."""
        assert tried.plan is not None
        step = captured(self.model, *self._call(tried.batch), self.options)
        planned = step.rewritten(step.recognized(tried.plan))
        return MeasuredBatch(*time_step(planned, step.args, step.kwargs, rounds=rounds))

    def _extrapolated(self, batch: int) -> ProfiledStep | None:
        # sizes of 1 broadcast: the step of one sample may be a special case
        size = max(2, min(self.steps))
        smaller, larger = self.steps[size], self.steps[size + 1]
        graph = extrapolated(smaller.graph, larger.graph, batch - size)
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
        return arguments.check_call(*made)


def search(
    attempt: Callable[[int], Tried],
    plain_probably_fits: Callable[[int], bool],
    probably_has_plan: Callable[[int], bool],
    budget_bytes: int,
    first: int = 1,
) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Predictions say which batches to try. The answer does not depend on them: the batch above the largest was tried, too.

    Args:
        attempt: captures and plans a batch.
        plain_probably_fits: predicts whether a batch's plain step fits, without capturing it; called once three were tried.
        probably_has_plan: predicts whether it has a plan, likewise.
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
            likely = _boundary(plain_probably_fits, third, third + 1)
            plain = _boundary(lambda batch: at(batch).plain_bytes <= budget_bytes, third, likely)
        known = max(third, plain)
        likely = _boundary(probably_has_plan, known, known + 1)
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


def extrapolated(smaller: Graph, larger: Graph, times: int) -> Graph | None:
    """`smaller` plus `times` times its difference to `larger`: the graph of a larger batch. None where they have other ops."""
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
