"""max_batch: the largest batch whose training step has a plan within a budget."""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
from torch import nn

from planner import arguments
from planner.analysis.margin import allocator_margin
from planner.captured import captured
from planner.errors import BudgetError, CaptureError, InfeasibleBudgetError, InputError, NoScheduleFoundError, PlannerError
from planner.graph.floor import floor
from planner.graph.graph import Graph, read_alone
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.structure import renamed, wiring
from planner.limits import Spending
from planner.log import PLANNER
from planner.options import MaxBatchKeywords, PlanOptions, read_options, with_options
from planner.profiled import ProfiledStep, budget_bytes, profiled
from planner.report.progress import say, stage
from planner.results.max_batch import MaxBatch, MeasuredBatch, Tried
from planner.results.plan import Plan
from planner.solver.solve import Solver
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import calls_users_code, concerns_model
from planner.tracer.refusal import own_words
from planner.units import format_ns, is_fraction, kind, shown
from planner.verification.measured import StepTimes, time_steps

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]
"""A batch's call: `args, kwargs = make_inputs(batch)`."""

_LARGEST_FIRST = 4
"""The largest batch that a search may begin with, where the model cannot run smaller ones."""
_MOST = 2**40
_PLANS = 3
"""The search may take the work of so many plans."""
_PREDICTION, _PREDICTIONS, _NEAR = 0.12, 6, 50
"""The largest batch is predicted by at most so many searches, each with this part of the work that is left, until it is known
to a fiftieth."""
_ATTEMPT = 1 / 3
"""Part of the work that is left for each batch that is tried."""
_TYPICAL = 8
"""Batches that a search tries: three small ones, and two on each side of a boundary, and one between."""


@with_options(MaxBatchKeywords)
def max_batch(make_inputs: MakeInputs, model: nn.Module, budget: int | str, **options: Unpack[MaxBatchKeywords]) -> MaxBatch:
    """The largest batch that fits a budget, its plan, and the throughput of the batches tried on the way.

    Each batch tried is captured again, without running the step; bytes grow evenly with the batch, so few are tried. The batch
    above the one returned was tried too and has no plan: proven, or none was found with the effort given; `print` says which.
    Schedules found for one batch are tried for the others, and kernels of equal shapes are measured once. With `progress`, a
    line on stderr says at the beginning what the search may take, and one what each batch came to.

    Args:
        make_inputs: `args, kwargs = make_inputs(batch)`, a training call with this many samples.
        model: as for `planner.plan`.
        budget: bytes, or text such as "6GiB".
        options: see below; the whole search takes at most three times `effort` and `time_limit_s`.

    Returns:
        a MaxBatch, which unpacks as `batch, plan`, prints as a table, and measures with `verify`.

    Raises:
        BudgetError, InputError, CaptureError: what was given cannot be planned; says why.
        InfeasibleBudgetError: not even the smallest batch that the model can run fits; carries its floor.
        NoScheduleFoundError: for that batch none was found with the effort given; carries the lowest peak that was found.
    """
    checked = read_options(options, MaxBatchKeywords, "max_batch")
    if isinstance(make_inputs, nn.Module):
        raise InputError("the order of arguments is max_batch(make_inputs, model, budget): the first one is a model")
    arguments.check_function(make_inputs, "make_inputs", "args, kwargs = make_inputs(batch)")
    arguments.check_model(model)
    if is_fraction(budget):
        raise BudgetError(f"budget {shown(budget)}: a fraction of which batch's peak? Give bytes, or text such as '6GiB'")
    batches = _Batches(make_inputs, model, checked, budget_bytes(budget, 0, checked), Spending(checked.limits.share(_PLANS)))
    with one_at_a_time():
        first, smaller = batches.first()
        batches.say_limits()
        try:
            tried = search(batches.attempt, batches.plain_probably_fits, batches.predicted, batches.budget_bytes, first)
        except (InfeasibleBudgetError, NoScheduleFoundError) as error:
            refusal = batches.step(first).refusal(error, budget, batches.budget_bytes, is_least_batch=True)
            refusal.args = (_smallest_does_not_fit(first, refusal),)
            raise refusal from None
    return MaxBatch(batches.budget_bytes, tried, batches.measure if checked.device is None else None, smaller)


@dataclass(slots=True)
class _Batches:
    """A model's training steps by batch, as `search` needs them."""

    make_inputs: MakeInputs
    model: nn.Module
    options: PlanOptions
    budget_bytes: int
    spending: Spending
    steps: dict[int, ProfiledStep] = field(default_factory=dict)
    """The steps of small batches, from which those of larger ones are extrapolated."""
    schedules: dict[str, list[Schedule]] = field(default_factory=dict)
    """Schedules that were found, by what is the same in the graphs of all batches that they can run."""

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

    def say_limits(self) -> None:
        """Say what the search may take, once the first batch has been captured."""
        effort, limit_s = self.spending.limits.effort, self.spending.limits.time_limit_s
        ended = "" if limit_s is None else f", and no more than {limit_s:.3g} s by the clock"
        self._say(
            f"max_batch: {_TYPICAL} batches or so are captured and profiled, as the first was; the solver spends at most "
            f"{effort:g} units of work on all of them, about {effort:g} s of a core{ended}"
        )

    def attempt(self, batch: int) -> Tried:
        """Capture and plan a batch."""
        step = self.step(batch)
        plan: Plan | None = None
        refusal: InfeasibleBudgetError | NoScheduleFoundError | None = None
        limits = self.spending.take(_ATTEMPT)
        with stage(f"solve for batch {batch}", self.options.progress):
            try:
                plan = step.solved(self.budget_bytes, limits, self._fitting(step.graph))
            except (InfeasibleBudgetError, NoScheduleFoundError) as error:
                refusal = error
        if plan is not None:
            self.spending.give_back(limits, plan.solution.work)
            self._known(step.graph).append(plan.solution.schedule)
        elif isinstance(refusal, InfeasibleBudgetError):  # by the floor, which is no work
            self.spending.give_back(limits, 0.0)
        PLANNER.info("batch %d: %s", batch, refusal or "planned")
        tried = Tried(batch, floor(step.graph)[0], step.plain_bytes, plan, refusal)
        self._say(f"max_batch: {tried}")
        return tried

    def plain_probably_fits(self, batch: int) -> bool:
        """Whether the extrapolated plain step of a batch is within the budget."""
        graph = self._extrapolated(batch)
        return graph is not None and simulate(graph, keep_all(graph)).peak_bytes <= self.budget_bytes

    def predicted(self, low: int) -> int:
        """The largest batch whose extrapolated step some schedule fits, as far as a part of the work shows.

        Args:
            low: a batch that has a plan; the least that is returned.
        """
        if self._extrapolated(low + 1) is None:
            return low
        with stage("predict the largest batch", self.options.progress):
            return self._predicted(low)

    def _predicted(self, low: int) -> int:
        """Find schedules of ever larger batches, between one that has a plan and the smallest whose floor is too high."""

        def may_fit(batch: int) -> bool:
            graph = self._extrapolated(batch)
            return graph is not None and floor(graph)[0] <= self.budget_bytes

        def fits(batch: int) -> bool:
            graph = self._extrapolated(batch)
            return graph is not None and bool(self._fitting(graph))

        high = 1 + _boundary(may_fit, low, low + 1)
        for _ in range(_PREDICTIONS):
            low = _boundary(fits, low, low + 1)
            if high - low <= max(1, low // _NEAR):
                return low
            middle = (low + high) // 2
            graph, limits = self._extrapolated(middle), self.spending.take(_PREDICTION)
            assert graph is not None
            try:
                found = Solver(graph).solve(self._limit_bytes(graph), limits, gap=1.0)  # any schedule will do
            except (InfeasibleBudgetError, NoScheduleFoundError):
                high = middle
            else:
                self.spending.give_back(limits, found.work)
                self._known(graph).append(found.schedule)
        return _boundary(fits, low, low + 1)

    def measure(self, tried: Sequence[Tried], rounds: int) -> dict[int, MeasuredBatch]:
        """Run planned steps of batches, even where a peak turns out to be above the budget.

        They run in turn, there and back: what slows the machine down for a while shows in the spread of all of them.
        """
        found: dict[int, list[StepTimes]] = {each.batch: [] for each in tried}
        for each in (*tried, *reversed(tried)):
            times = self._times(each, rounds)
            found[each.batch].append(times)
            self._say(f"max_batch: ran batch {each.batch}: {format_ns(1e9 * statistics.median(times.seconds))} a step")
        return {
            batch: MeasuredBatch.of([s for time in times for s in time.seconds], max(time.peak_bytes for time in times))
            for batch, times in found.items()
        }

    def _times(self, tried: Tried, rounds: int) -> StepTimes:
        """Capture a batch once more, and run its planned step: the inputs of no other batch take memory meanwhile."""
        assert tried.plan is not None
        gc.collect()  # the step before is held by cycles
        step = captured(self.model, *self._call(tried.batch), self.options)
        return time_steps(step.rewritten(step.recognized(tried.plan)), step.args, step.kwargs, rounds=rounds)

    def _known(self, graph: Graph) -> list[Schedule]:
        """Schedules that were found for batches with the same graph but for its sizes; what is added there is known."""
        shape = json.dumps([wiring(graph), [op.recomputable for op in graph.ops], graph.backward_is_fixed])
        return self.schedules.setdefault(hashlib.sha256(shape.encode()).hexdigest(), [])

    def _fitting(self, graph: Graph) -> list[Schedule]:
        """The known schedules that keep the budget. One that does not would lead the solver's descent astray."""
        limit_bytes = self._limit_bytes(graph)
        return [schedule for schedule in self._known(graph) if simulate(graph, schedule).peak_bytes <= limit_bytes]

    def _limit_bytes(self, graph: Graph) -> int:
        return self.budget_bytes - allocator_margin(graph, self.budget_bytes)

    def _extrapolated(self, batch: int) -> Graph | None:
        # sizes of 1 broadcast: the step of one sample may be a special case
        size = max(2, min(self.steps))
        return extrapolated(self.steps[size].graph, self.steps[size + 1].graph, batch - size)

    def _say(self, text: str) -> None:
        say(text, self.options.progress)

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
        if not isinstance(made, tuple) or len(made) != 2 or isinstance(made[1], torch.Tensor):
            raise InputError(f"make_inputs({batch}) must return (args, kwargs), such as ((x,), {{}}), not {kind(made)}")
        return arguments.check_call(*made)


def search(
    attempt: Callable[[int], Tried],
    plain_probably_fits: Callable[[int], bool],
    predicted: Callable[[int], int],
    budget_bytes: int,
    first: int = 1,
) -> tuple[Tried, ...]:
    """Find the largest batch that has a plan, and the largest that needs no recomputing, by few attempts.

    Predictions say which batches to try. The answer does not depend on them: the batch above the largest was tried, too.

    Args:
        attempt: captures and plans a batch.
        plain_probably_fits: predicts whether a batch's plain step fits, without capturing it; called once three were tried.
        predicted: the largest batch that probably has a plan, or a guess, given one that has; called once, likewise.
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
        raise error
    second, third = first + 1, first + 2
    if at(second).plan is not None and at(third).plan is not None:
        plain = max((batch for batch in (first, second, third) if at(batch).plain_bytes <= budget_bytes), default=0)
        if plain == third:
            likely = _boundary(plain_probably_fits, third, third + 1)
            plain = _boundary(lambda batch: at(batch).plain_bytes <= budget_bytes, third, likely)
        known = max(third, plain)
        largest = _boundary(lambda batch: at(batch).plan is not None, known, predicted(known))
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
        return first + times * (second - first)

    # `form` says sizes that are not extrapolated
    values = tuple(replace(v, nbytes=max(0, at(smaller.value[v.name].nbytes, v.nbytes)), form="") for v in larger.values)
    nbytes = {value.name: value.nbytes for value in values}
    ops = []
    for a, b in zip(smaller.ops, larger.ops, strict=True):
        least = -sum(nbytes[name] for name in read_alone(larger, b)) if b.workspace_bytes < 0 else 0
        workspace = max(least, at(a.workspace_bytes, b.workspace_bytes))
        ops.append(replace(b, cost_ns=max(0, at(a.cost_ns, b.cost_ns)), workspace_bytes=workspace))
    return replace(larger, values=values, ops=tuple(ops))
