"""The largest batch that a budget holds, and how fast each batch that was tried trains. Prints as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from planner.arguments import count
from planner.errors import InfeasibleBudgetError, InputError, NoScheduleFoundError
from planner.report.tables import Block, facts, number, render, table, words
from planner.results.figures import head
from planner.results.plan import Plan
from planner.results.plan_file import provenance_fields
from planner.units import format_bytes, format_ns

_NOTICEABLE = 0.02
"""A gain in throughput below this is within what predictions and measurements are good for, however small their spread."""


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """A planned step that was run.

    Attributes:
        step_s: median seconds of a step.
        peak_bytes: peak, with everything resident.
        spread_s: interquartile range of the steps' seconds.
    """

    step_s: float
    peak_bytes: int
    spread_s: float = 0.0

    @staticmethod
    def of(seconds: Sequence[float], peak_bytes: int) -> MeasuredBatch:
        """Of several steps."""
        low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
        return MeasuredBatch(median, peak_bytes, high - low)


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
    def predicted(self) -> Rate:
        """Throughput of forward and backward as planned; 0 where there is no plan."""
        if self.plan is None:
            return Rate(self.batch, 0.0)
        spread = self.plan.provenance.spread if self.plan.provenance is not None else 0.0
        return Rate(self.batch, self.batch / max(self.plan.timeline.time_ns / 1e9, 1e-9), spread / 2)

    @property
    def ran(self) -> Rate | None:
        """Throughput of forward and backward as measured; None where no step was run."""
        if self.measured is None:
            return None
        step_s = max(self.measured.step_s, 1e-9)
        return Rate(self.batch, self.batch / step_s, self.measured.spread_s / step_s / 2)

    def __str__(self) -> str:
        about = f"batch {self.batch}, plain peak {format_bytes(self.plain_bytes)}"
        if self.plan is None:
            return f"{about}: no plan ({type(self.error).__name__.removesuffix('Error')})"
        peak, time = format_bytes(self.plan.peak_bytes), format_ns(self.plan.timeline.time_ns)
        return f"{about}: planned peak {peak}, {time} a step ({self.plan.overhead:+.1%}), {self.predicted}"


@dataclass(frozen=True, slots=True)
class Rate:
    """Throughput of a batch. The table prints it, and the verdict compares it.

    Attributes:
        batch: how many samples.
        samples_per_s: of forward and backward.
        noise: relative; by so much it may be more or less.
    """

    batch: int
    samples_per_s: float
    noise: float = 0.0

    def text(self, unit: str = "") -> str:
        """The samples a second, with a unit behind them and the noise, if there is any to speak of."""
        shown = f"{self.samples_per_s:,.0f}" if self.samples_per_s >= 1000 else f"{self.samples_per_s:.3g}"
        return shown + unit + (f" ±{self.noise:.0%}" if self.noise >= 0.005 else "")

    def __str__(self) -> str:
        return self.text(" samples/s")

    def gain_on(self, other: Rate) -> float:
        """How much more it is than another one, relative to that."""
        return self.samples_per_s / other.samples_per_s - 1

    def is_as_fast_as(self, other: Rate) -> bool:
        """They differ by no more than both are uncertain."""
        return abs(self.gain_on(other)) < max(_NOTICEABLE, self.noise + other.noise)


Measure = Callable[[Sequence[Tried], int], Mapping[int, MeasuredBatch]]
"""Runs the plans of batches for this many steps each, twice; by batch."""


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
    def rates(self) -> Mapping[int, Rate]:
        """What is compared, by batch: measured steps, if those of the largest batch and the largest plain one were run.

        Measured and predicted ones are never compared with each other.
        """
        measured = {tried.batch: rate for tried in self.fitting if (rate := tried.ran) is not None}
        base = self.largest_plain or self.largest
        if base.batch in measured and self.batch in measured:
            return measured
        return {tried.batch: tried.predicted for tried in self.fitting}

    @property
    def fastest(self) -> Tried:
        """The batch with the most samples a second; among those that were measured, where some were."""
        rates = self.rates
        compared = [tried for tried in self.fitting if tried.batch in rates]
        return max(compared, key=lambda tried: (rates[tried.batch].samples_per_s, -tried.batch))

    @property
    def is_measured(self) -> bool:
        """The verdict is about steps that were run."""
        return self.rates[self.batch] == self.largest.ran

    @property
    def verdict(self) -> str:
        """Whether recomputing for a larger batch trains more samples a second than the largest batch that needs none.

        It compares `rates`, which the table prints, and calls a difference within their noise what it is.
        """
        rates = self.rates
        how = "measured" if self.is_measured else "estimated" if self.plan.is_estimated else "predicted"
        fastest, last = rates[self.fastest.batch], rates[self.batch]
        base = None if self.largest_plain is None else rates[self.largest_plain.batch]
        if base is None:
            return f"every batch needs recomputing; the fastest is {_rate(fastest)} ({how})"
        if not self.largest.recomputes:
            return f"the largest batch needs no recomputing: {_rate(last)} ({how})"
        best = fastest if self.fastest.recomputes else last
        gain = f"{best.gain_on(base):+.1%} on {_rate(base)}, the largest that needs none"
        if best.is_as_fast_as(base):
            return f"recomputing changes little: {_rate(best)}, {gain}: within the noise ({how})"
        if self.fastest.recomputes:
            return f"recomputing pays: {_rate(best)}, {gain} ({how})"
        return f"recomputing for a larger batch does not pay: {_rate(best)}, {gain} ({how})"

    @property
    def doubt(self) -> str:
        """Where the verdict on measured steps is not what predicted ones would say; "" where it is."""
        if not self.is_measured or self.largest_plain is None or not self.largest.recomputes:
            return ""
        rates, base, best = self.rates, self.largest_plain, self.fastest if self.fastest.recomputes else self.largest
        ran, predicted = rates[best.batch].gain_on(rates[base.batch]), best.predicted.gain_on(base.predicted)
        noise = sum(rate.noise for tried in (base, best) for rate in (rates[tried.batch], tried.predicted))
        if abs(ran - predicted) <= max(_NOTICEABLE, noise):
            return ""
        return f"measured {ran:+.1%}, predicted {predicted:+.1%}: measure again on an idle machine, with more rounds"

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
        chosen = list({tried.batch: tried for tried in wanted if tried is not None}.values())[: max(2, n)]
        measured = self.measure(chosen, rounds)
        seen = (replace(t, measured=measured[t.batch]) if t.batch in measured else t for t in self.tried)
        return replace(self, tried=tuple(seen))

    def _mark(self, tried: Tried) -> str:
        """What a row of the table is: the largest, the fastest by what is compared, or both."""
        marks = [name for name, one in (("largest", self.largest), ("fastest", self.fastest)) if tried.batch == one.batch]
        return " ".join(["<-", *marks]) if marks else ""

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
            "doubt": self.doubt,
            "proof": self.proof,
            "provenance": provenance_fields(self.plan.provenance),
            "tried": [_figures(tried) for tried in self.tried],
        }

    def __str__(self) -> str:
        head = [
            ("batch", f"{self.batch} is the largest within {format_bytes(self.budget_bytes)}; {self.proof}"),
            ("smallest", f"{self.tried[0].batch}; below it: {self.smaller}" if self.smaller else ""),
            ("throughput", self.verdict),
            ("doubt", self.doubt),
            ("costs", str(self.plan.provenance or "unknown")),
        ]
        columns = [*map(number, ("batch", "plain peak", "peak", "step time", "overhead", "samples/s")), words("")]
        rows = [_row(tried, self._mark(tried)) for tried in self.tried]
        parts: list[Block] = [
            facts(head),
            "",
            table(columns, rows),
            "samples a second of forward and backward alone, as predicted",
        ]
        measured = [tried for tried in self.tried if tried.measured is not None]
        if measured:
            columns = [*map(number, ("batch", "measured peak", "measured time", "measured samples/s"))]
            parts += ["", table(columns, map(_measured_row, measured))]
        return render(*parts)


def _rate(rate: Rate) -> str:
    return f"batch {rate.batch} at {rate}"


def _row(tried: Tried, mark: str) -> tuple[str, ...]:
    head = (str(tried.batch), format_bytes(tried.plain_bytes))
    if tried.plan is None:
        return (*head, "", "", "", "", "cannot fit" if isinstance(tried.error, InfeasibleBudgetError) else "none found")
    step = (format_bytes(tried.plan.peak_bytes), format_ns(tried.plan.timeline.time_ns), f"{tried.plan.overhead:.2%}")
    return (*head, *step, tried.predicted.text(), mark)


def _measured_row(tried: Tried) -> tuple[str, ...]:
    assert tried.measured is not None and tried.ran is not None
    step = (format_bytes(tried.measured.peak_bytes), format_ns(tried.measured.step_s * 1e9))
    return (str(tried.batch), *step, tried.ran.text())


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
        "samples_per_s": None if plan is None else tried.predicted.samples_per_s,
        "noise": None if plan is None else tried.predicted.noise,
        "measured": None if seen is None else asdict(seen),
    }
