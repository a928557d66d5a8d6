"""What the profiler returns for a joint graph: a time and a workspace for each kernel call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One execution of one kernel.

    Attributes:
        time_ns: time of the call, inside a training step.
        workspace_bytes: peak of the call above what is alive when it returns (inputs and outputs).
        hidden_bytes: per storage that it makes, in order, bytes of the real storage beyond the fake tensor's (a mean loss may
            keep the losses it was computed from, a layer norm its statistics in float32); empty for none.
    """

    time_ns: int
    workspace_bytes: int
    hidden_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs by fx node name.

    Attributes:
        costs: one entry for each node that was passed in.
        device: the machine the figures hold for, for people to read.
        model: the device model that every cost was estimated with; "" where kernels were measured.
        num_kernels, num_estimated: distinct kernels, and how many of them could not be measured; 0 where `model` is set.
    """

    costs: Mapping[str, KernelCost]
    device: str
    model: str = ""
    num_kernels: int = 0
    num_estimated: int = 0
