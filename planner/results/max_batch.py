"""The largest batch that a budget holds, and how fast each batch that was tried trains. Prints as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from planner.arguments import count
from planner.errors import InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.report.tables import Block, facts, number, render, table, words
from planner.results.figures import head
from planner.results.plan import Plan
from planner.results.plan_file import provenance_fields
from planner.units import format_bytes, format_ns

_NOTICEABLE = 0.02
"""A gain in throughput below this is within what predictions and measurements are good for."""


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """A planned step that was run: seconds by the wall clock, and the peak with everything resident."""

    step_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Tried:
    """One batch.

    Attributes:
        batch: how many samples.
        floor_bytes: no schedule in the captured backward order has a lower peak.
        plain_bytes: peak of the step that keeps everything.
        plan: the best plan found; None where there is none.
        error: why there is none.
        measured: the planned step as it ran.
    """

    batch: int
    floor_bytes: int
    plain_bytes: int
    plan: Plan | None
    error: InfeasibleBudgetError | NoScheduleFoundError | None = None
    measured: MeasuredBatch | None = None

    @property
    def recomputes(self) -> bool:
        """It fits, but not without running kernels again."""
        return self.plan is not None and bool(self.plan.solution.schedule.recomputes())

    @property
    def step_s(self) -> float:
        """Seconds of forward and backward: measured if it was, else as predicted; infinite where there is no plan."""
        if self.measured is not None:
            return self.measured.step_s
        return float("inf") if self.plan is None else self.plan.timeline.time_ns / 1e9

    @property
    def samples_per_s(self) -> float:
        """Throughput of forward and backward; 0 where there is no plan."""
        return self.batch / max(self.step_s, 1e-9)


Measure = Callable[[Tried, int], MeasuredBatch]
"""Runs a batch's plan for this many steps."""


@dataclass(frozen=True, slots=True)
class MaxBatch:
    """The largest batch within a budget: `batch, plan = max_batch(...)`.

    Attributes:
        budget_bytes: bound on everything live during a step.
        tried: the batches looked at, smallest first; the smallest fits.
        measure: runs a batch of this search; None where the device is not here.
        smaller: why batches below the smallest one tried cannot run; "" where that is 1.
    """

    budget_bytes: int
    tried: tuple[Tried, ...]
    measure: Measure | None = field(default=None, repr=False, compare=False)
    smaller: str = ""

    def __iter__(self) -> Iterator[Any]:
        yield self.batch
        yield self.plan

    @property
    def fitting(self) -> tuple[Tried, ...]:
        """The batches that have a plan."""
        return tuple(tried for tried in self.tried if tried.plan is not None)

    @property
    def largest(self) -> Tried:
        """The largest batch that has a plan; the one above it was tried and has none."""
        return self.fitting[-1]

    @property
    def batch(self) -> int:
        """How many samples it has."""
        return self.largest.batch

    @property
    def plan(self) -> Plan:
        """Its plan."""
        assert self.largest.plan is not None
        return self.largest.plan

    @property
    def largest_plain(self) -> Tried | None:
        """The largest batch that needs no recomputing; None where batch 1 does."""
        plain = [tried for tried in self.fitting if not tried.recomputes]
        return plain[-1] if plain else None

    @property
    def fastest(self) -> Tried:
        """The batch with the most samples a second; among those that were measured, where some were."""
        compared = [tried for tried in self.fitting if tried.measured is not None] or self.fitting
        return max(compared, key=lambda tried: (tried.samples_per_s, -tried.batch))

    @property
    def verdict(self) -> str:
        """Whether recomputing for a larger batch trains more samples a second than the largest batch that needs none."""
        fastest, base, last = self.fastest, self.largest_plain, self.largest
        how = "measured" if fastest.measured else "estimated" if self.plan.is_estimated else "predicted"
        if base is None:
            return f"every batch needs recomputing; the fastest is {_rate(fastest)} ({how})"
        if not last.recomputes:
            return f"the largest batch needs no recomputing: {_rate(last)} ({how})"
        if fastest.recomputes:
            gain = fastest.samples_per_s / base.samples_per_s - 1
            pays = "recomputing pays" if gain >= _NOTICEABLE else "recomputing changes little"
            return f"{pays}: {_rate(fastest)}, {gain:+.1%} on {_rate(base)}, the largest that needs none ({how})"
        loss = last.samples_per_s / fastest.samples_per_s - 1
        return f"recomputing for a larger batch does not pay: {_rate(fastest)}; {_rate(last)}, {loss:+.1%} ({how})"

    @property
    def proof(self) -> str:
        """Why the batch above has no plan: proven, or none found with the effort given."""
        above = next(tried for tried in self.tried if tried.batch > self.batch)
        if isinstance(above.error, InfeasibleBudgetError):
            return f"batch {above.batch} cannot fit: no schedule needs less than {format_bytes(above.error.floor_bytes)}"
        return f"for batch {above.batch} no schedule was found with the effort given; that none exists was not proven"

    def verify(self, n: int = 3, *, rounds: int = 3) -> MaxBatch:
        """This search with the steps of `n` batches run and timed: always the largest and the largest plain, then others.

        Raises:
            InputError: `n` is not positive, or the device is not here.
        """
        n, rounds = count(n, "n"), count(rounds, "rounds")
        if self.measure is None:
            raise InputError("the device that this was planned for is not here: nothing can be measured")
        wanted = [self.largest, self.largest_plain, self.fastest, *reversed(self.fitting)]
        chosen = list(dict.fromkeys(tried.batch for tried in wanted if tried is not None))[: max(2, n)]
        run = self.measure
        seen = (replace(t, measured=run(t, rounds)) if t.batch in chosen else t for t in self.tried)
        return replace(self, tried=tuple(seen))

    def summary(self) -> dict[str, Any]:
        """The figures for machines, without graphs and schedules: what `planner max-batch --json` prints."""
        return {
            **head("max-batch"),
            "budget_bytes": self.budget_bytes,
            "batch": self.batch,
            "smallest": self.tried[0].batch,
            "largest_plain": None if self.largest_plain is None else self.largest_plain.batch,
            "fastest": self.fastest.batch,
            "verdict": self.verdict,
            "proof": self.proof,
            "provenance": provenance_fields(self.plan.provenance),
            "tried": [_figures(tried) for tried in self.tried],
        }

    def __str__(self) -> str:
        head = [
            ("batch", f"{self.batch} is the largest within {format_bytes(self.budget_bytes)}; {self.proof}"),
            ("smallest", f"{self.tried[0].batch}; below it: {self.smaller}" if self.smaller else ""),
            ("throughput", self.verdict),
            ("costs", str(self.plan.provenance or "unknown")),
        ]
        columns = [*map(number, ("batch", "plain peak", "peak", "step time", "overhead", "samples/s")), words("")]
        rows = [_row(tried, "<- largest" if tried is self.largest else "") for tried in self.tried]
        parts: list[Block] = [facts(head), "", table(columns, rows), "samples/s of forward and backward alone"]
        measured = [tried for tried in self.tried if tried.measured is not None]
        if measured:
            columns = [*map(number, ("batch", "measured peak", "measured time", "measured samples/s"))]
            parts += ["", table(columns, map(_measured_row, measured))]
        return render(*parts)


def _rate(tried: Tried) -> str:
    return f"batch {tried.batch} at {_number(tried.samples_per_s)} samples/s"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def _row(tried: Tried, mark: str) -> tuple[str, ...]:
    head = (str(tried.batch), format_bytes(tried.plain_bytes))
    if tried.plan is None:
        return (*head, "", "", "", "", type(tried.error).__name__.removesuffix("Error"))
    rate = replace(tried, measured=None).samples_per_s
    step = (format_bytes(tried.plan.peak_bytes), format_ns(tried.plan.timeline.time_ns), f"{tried.plan.overhead:.2%}")
    return (*head, *step, _number(rate), mark)


def _measured_row(tried: Tried) -> tuple[str, ...]:
    assert tried.measured is not None
    step = (format_bytes(tried.measured.peak_bytes), format_ns(tried.measured.step_s * 1e9))
    return (str(tried.batch), *step, _number(tried.samples_per_s))


def _figures(tried: Tried) -> dict[str, Any]:
    plan, seen = tried.plan, tried.measured
    return {
        "batch": tried.batch,
        "error": None if tried.error is None else type(tried.error).__name__,
        "floor_bytes": tried.floor_bytes,
        "plain_bytes": tried.plain_bytes,
        "peak_bytes": None if plan is None else plan.peak_bytes,
        "step_ns": None if plan is None else plan.timeline.time_ns,
        "overhead": None if plan is None else plan.overhead,
        "samples_per_s": None if plan is None else replace(tried, measured=None).samples_per_s,
        "measured": None if seen is None else {"step_s": seen.step_s, "peak_bytes": seen.peak_bytes},
    }
