"""How the costs that a plan was made with were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Costs = Literal["measured", "estimated"]
COSTS: tuple[str, ...] = get_args(Costs)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How, where, when and by which torch the costs of a graph were found. Prints as a line.

    Attributes:
        costs: "measured" on the device, or "estimated": then workspace is hardly known.
        device: what the costs hold for, for people.
        is_here: the device was here; otherwise kernels are those that torch was expected to choose there.
        model: the `DeviceModel` that all costs were estimated with; "" where they were measured.
        num_kernels, num_estimated: distinct kernels of a measured step, and how many of them could not be run.
        spread: how much the repeats of measured kernels differ: sum of their interquartile ranges over that of their times.
        opaque: submodules that run as they are, by qualified name.
        repeats: (class, number) of equal blocks that were captured once.
        torch: its version.
        date: year-month-day.
        module: class of the model; "" where it is not known (files of earlier versions).
        loss: names of the outputs that backward starts from; empty where they are not known (likewise).
        call: which calls it is a plan for, for people, where it is for those alone that find certain Python state; else "".
    """

    costs: Costs
    device: str
    is_here: bool = True
    model: str = ""
    num_kernels: int = 0
    num_estimated: int = 0
    spread: float = 0.0
    opaque: tuple[str, ...] = ()
    repeats: tuple[tuple[str, int], ...] = ()
    torch: str = ""
    date: str = ""
    module: str = ""
    loss: tuple[str, ...] = ()
    call: str = ""

    @property
    def is_estimated(self) -> bool:
        """No kernel was run."""
        return self.costs == "estimated"

    def __str__(self) -> str:
        how = f"costs {self.costs}"
        if self.model:
            how += f" for {self.model}"
        if self.spread:
            how += f" (±{100 * self.spread / 2:.2g}%)"
        if self.num_estimated:
            how += f", {self.num_estimated} of {self.num_kernels} kernels estimated"
        parts = [
            f"{self.device}{'' if self.is_here else ' (not here)'}",
            how,
            f"torch {self.torch}" if self.torch else "",
            f"as they are: {', '.join(self.opaque)}" if self.opaque else "",
            *(f"{count} {kind} captured once" for kind, count in self.repeats),
            self.date,
        ]
        return "; ".join(part for part in parts if part)
