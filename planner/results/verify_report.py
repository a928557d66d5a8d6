"""VerifyReport: measurements of planned steps beside plain ones."""

from __future__ import annotations

from dataclasses import dataclass

from planner.report.tables import facts, render
from planner.units import format_bytes


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of `verify`: planned steps compared with plain steps from the same state.

    Attributes:
        differences: names of what is not bit-equal: outputs, gradients, inputs, parameters, buffers, attributes of modules,
            random generators; from the second step on with the step's number. Empty where everything is equal.
        num_compared: number of values compared.
        largest_difference: largest absolute difference of two entries, divided by the largest entry of all tensors of the same
            kind; inf where tensors cannot be compared.
        compiled: the planned step ran inductor's kernels, which round differently.
        num_steps: number of successive steps compared; state is carried from one to the next.
        unplanned: steps that ran the original forward instead, each with the reason.
        budget_bytes, predicted_peak_bytes, measured_peak_bytes: of the planned step, in bytes, resident bytes included.
        plain_peak_bytes: measured peak of the plain step; None where it did not fit on the device.
        time_ratio: time of a planned step / time of a plain step, median of interleaved pairs; None where none was timed.
        time_spread: lowest and highest ratio of a pair.
        noise: lowest and highest ratio of two plain steps of one pair: the accuracy of a ratio on this machine.
        num_pairs: number of pairs timed.
    """

    differences: tuple[str, ...]
    num_compared: int
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    plain_peak_bytes: int | None
    time_ratio: float | None
    largest_difference: float = 0.0
    compiled: bool = False
    num_steps: int = 0
    unplanned: tuple[str, ...] = ()
    time_spread: tuple[float, float] | None = None
    noise: tuple[float, float] | None = None
    num_pairs: int = 0

    @property
    def exact(self) -> bool:
        """Whether everything that was compared is bit-equal."""
        return not self.differences and self.num_compared > 0

    @property
    def within_budget(self) -> bool:
        """Whether the measured peak is at or below the budget."""
        return self.measured_peak_bytes <= self.budget_bytes

    def __str__(self) -> str:
        names = ", ".join(self.differences[:5]) or "nothing could be compared"
        off = f"by up to {self.largest_difference:.1e}"
        unequal = f"compiled, different {off}" if self.compiled else f"DIFFERENT {off}: {names}"
        same = "bit-equal" if self.exact else unequal
        plain = "did not fit" if self.plain_peak_bytes is None else format_bytes(self.plain_peak_bytes)
        rows = [
            (
                "results",
                f"{same} ({self.num_compared} values in {self.num_steps} successive steps: "
                "outputs, gradients, inputs, parameters, buffers, attributes, random generators)",
            ),
            *(("", f"unplanned: {which}") for which in self.unplanned),
            (
                "peak",
                f"measured {format_bytes(self.measured_peak_bytes)}, predicted {format_bytes(self.predicted_peak_bytes)}, "
                f"budget {format_bytes(self.budget_bytes)} ({'kept' if self.within_budget else 'EXCEEDED'}); plain {plain}",
            ),
            ("step time", self._time()),
        ]
        return render(facts(rows))

    def _time(self) -> str:
        if self.time_ratio is None or self.time_spread is None:
            return "not measured"
        noise = "" if self.noise is None else f"; plain against itself {self.noise[0]:.2f}-{self.noise[1]:.2f}"
        low, high = self.time_spread
        return f"{self.time_ratio:.2f}x plain (median of {self.num_pairs} pairs, {low:.2f}-{high:.2f}{noise})"
