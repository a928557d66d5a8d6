"""Entries of benchmarks/field that go wrong on purpose, each in its own way; nothing but torch is needed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.field.case import Registry, Setup, batches, call, on_output

CASES = Registry(__name__)


def setup(model: nn.Module | None = None, **changes: Any) -> Setup:
    """A model that trains exactly, but for `changes`."""
    body = model or nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))
    data = batches(lambda: call(torch.randn(64, 8), target=torch.randn(64, 8)))
    return Setup(body, data, on_output(nn.functional.mse_loss), **changes)


def only_planned(fault: Callable[[nn.Module], Any]) -> Callable[[nn.Module, int], None]:
    """Goes wrong after the second step of the planned side."""

    def after_step(module: nn.Module, step: int) -> None:
        if hasattr(module, "plan") and step == 1:
            fault(module)

    return after_step


@CASES("torch")
def exact() -> Setup:
    return setup()


@CASES("torch")
def different_parameter() -> Setup:
    def fault(module: nn.Module) -> None:
        with torch.no_grad():
            entries = next(module.parameters()).view(-1)
            entries[0] = torch.nextafter(entries[0], torch.tensor(9.0))  # by one bit

    return setup(after_step=only_planned(fault))


@CASES("torch")
def different_attribute() -> Setup:
    model = nn.Sequential(nn.Linear(8, 8))
    model.history = {"seen": [1, 2]}

    def fault(module: Any) -> None:
        module.original.history["seen"].append(3)

    return setup(model, after_step=only_planned(fault))


@CASES("torch")
def different_generator() -> Setup:
    return setup(after_step=only_planned(lambda module: random.random()))


@CASES("torch")
def raises() -> Setup:
    def fault(module: nn.Module) -> None:
        raise KeyError("made up")

    return setup(after_step=only_planned(fault))


@CASES("torch")
def aborts() -> Setup:
    return setup(after_step=only_planned(lambda module: os.abort()))


@CASES("torch")
def hangs() -> Setup:
    return setup(before_step=lambda module, step: time.sleep(600) if hasattr(module, "plan") else None)


class Counted(nn.Module):
    """Its own forward counts its calls and reads the count, so that only what is inside can be planned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), *(nn.GELU() for _ in range(6)), nn.Linear(64, 8))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x) / self.calls


@CASES("torch")
def in_units() -> Setup:
    return setup(Counted())


@CASES("torch")
def refused() -> Setup:
    return setup(plan={"costs": "made up"})


@CASES("torch")
def unplanned() -> Setup:
    made = setup()
    longer = call(torch.randn(65, 8), target=torch.randn(65, 8))
    return Setup(made.model, (made.batches[0], longer, made.batches[2]), made.loss)


@CASES("torch")
def eager_raises() -> Setup:
    return setup(nn.Linear(7, 8))


@CASES("torch")
def eager_varies() -> Setup:
    count = len(_BUILT)
    _BUILT.append(count)
    return setup(nn.Sequential(nn.Linear(8, 8), nn.Dropout(count / 10)))


_BUILT: list[int] = []
