"""What the profiler returns for a joint graph: a time and a workspace for each kernel call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One execution of one kernel.

    Attributes:
        time_ns: time of the call, inside a training step; of a measured one its fastest repeat, since disturbances only add.
        workspace_bytes: peak of the call above what is alive when it returns (inputs and outputs).
        hidden_bytes: per storage that it makes, in order, bytes of the real storage beyond the fake tensor's (a mean loss may
            keep the losses it was computed from, a layer norm its statistics in float32); empty for none.
        median_ns: median time of the repeats.
        spread_ns: interquartile range of the repeats' times.
        num_repeats: how often it was timed; 0 where the time is estimated.
    """

    time_ns: int
    workspace_bytes: int
    hidden_bytes: tuple[int, ...] = ()
    median_ns: int = 0
    spread_ns: int = 0
    num_repeats: int = 0

    def timed_as(self, other: KernelCost) -> KernelCost:
        """This cost with the times of another measurement, whose workspace may be left out."""
        return replace(
            self, time_ns=other.time_ns, median_ns=other.median_ns, spread_ns=other.spread_ns, num_repeats=other.num_repeats
        )

    def to_row(self) -> list[int]:
        """As JSON data."""
        return [self.time_ns, self.workspace_bytes, self.median_ns, self.spread_ns, self.num_repeats, *self.hidden_bytes]

    @staticmethod
    def of_row(row: Sequence[int]) -> KernelCost:
        """A cost out of its row; ValueError where it is too short."""
        time_ns, workspace_bytes, median_ns, spread_ns, num_repeats, *hidden_bytes = row
        return KernelCost(time_ns, workspace_bytes, tuple(hidden_bytes), median_ns, spread_ns, num_repeats)


def spread_of(costs: Iterable[KernelCost]) -> float:
    """Sum of the spreads of measured costs as a fraction of the sum of their times; 0 where none was measured."""
    measured = [cost for cost in costs if cost.num_repeats]
    return sum(cost.spread_ns for cost in measured) / max(1, sum(cost.time_ns for cost in measured))


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs by fx node name.

    Attributes:
        costs: one entry for each node that was passed in.
        device: the machine the figures hold for, for people to read.
        model: the device model that every cost was estimated with; "" where kernels were measured.
        num_kernels, num_estimated: distinct kernels, and how many of them could not be measured; 0 where `model` is set.
        spread: sum of the calls' spreads as a fraction of the sum of their times; 0 where none was measured.
    """

    costs: Mapping[str, KernelCost]
    device: str
    model: str = ""
    num_kernels: int = 0
    num_estimated: int = 0
    spread: float = 0.0
