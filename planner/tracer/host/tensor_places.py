"""A tensor that exists before a forward, and what a forward reads of it beside its data and form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from planner.tracer.host.fingerprint import Fingerprint
from planner.tracer.host.values import ABSENT

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
LOST = type("Lost", (), {"__repr__": lambda self: "lost", "__reduce__": lambda self: "LOST"})()
"""Stands for a value that did not travel in a pickle."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor is found before each call.

    Attributes:
        kind: "weight" (a parameter or buffer), "input" (a tensor of the call) or "state" (a tensor in Python state).
        key: its qualified name; its position among the call's tensors; its Path.
    """

    kind: str
    key: Any

    def __str__(self) -> str:
        return f"input {self.key}" if self.kind == "input" else str(self.key)

    @property
    def module(self) -> str:
        """The submodule that holds it; "" for the model itself, and for inputs."""
        if self.kind == "input":
            return ""
        return str(self.key).rpartition(".")[0] if self.kind == "weight" else str(self.key.module)


@dataclass(frozen=True, slots=True)
class TensorRead:
    """An attribute of a tensor that a forward reads.

    Attributes:
        place: of the tensor.
        name: of the attribute, or of a method without arguments.
        expected: fingerprint of what was read.
        module: qualified name of the submodule that was running.
        value: what was read. What is no plain value does not travel in pickles.
    """

    place: TensorPlace
    name: str
    expected: Fingerprint
    module: str
    value: Any = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        value = self.value if type(self.value) in _PLAIN or self.value is ABSENT else LOST
        return TensorRead, (self.place, self.name, self.expected, self.module, value)
