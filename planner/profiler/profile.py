"""What the profiler knows about a joint graph: a time and a workspace for each kernel call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One execution of one kernel.

    Attributes:
        time_ns: time of the call, inside a training step.
        workspace_bytes: peak of the call above what is alive when it returns (inputs and outputs).
        hidden_bytes: per storage that it makes, in order, what it holds beyond what its fake shape and type need (a mean loss
            may keep all it was made of, a layer norm its statistics in float32); empty for none.
    """

    time_ns: int
    workspace_bytes: int
    hidden_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs by fx node name.

    Attributes:
        costs: one entry for each node that was passed in.
        how: "measured", "measured, 2 of 51 kernels estimated" or "estimated: <device>".
        device: the machine the figures hold for, for people to read.
    """

    costs: Mapping[str, KernelCost]
    how: str
    device: str
