"""What a model of a public package declares: itself, three batches, and the loss as its users write it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn

STEPS = 3
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Batch:
    """One training call: `model(*args, **kwargs)`, and what the loss compares its output with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None


def call(*args: Any, target: Any = None, **kwargs: Any) -> Batch:
    """Write a batch as the call that it is."""
    return Batch(args, kwargs, target)


def output_loss(module: nn.Module, out: Any, target: Any) -> torch.Tensor:
    """Loss of a model that computes it itself: the output, or its `loss`."""
    del module, target
    if isinstance(out, torch.Tensor):
        return out
    loss: torch.Tensor = out["loss"] if isinstance(out, dict) else out.loss
    return loss


Loss = Callable[[nn.Module, Any, Any], torch.Tensor]
Forward = Callable[[nn.Module, Batch], tuple[Any, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Setup:
    """One model, ready to train.

    Attributes:
        model: in training mode, on the CPU.
        batches: one per step; all have the shapes of the first, which is the one planned for.
        loss: of the module that the loop holds, its output and the batch's target. Runs under the same autocast.
        forward: for loops that do more than one call a step; returns (anything to compare, loss).
        before_step, after_step: what the loop does around a step, given the module that it holds and the step's number.
        plan: keyword arguments of `planner.plan` that a user of this model would pass.
        extra: a module that the loss holds, trained and compared with the model, but not planned.
        left_out: outputs that a plan documents to leave out (key-value caches): the start of their names, as they are compared.
        copied: trained is a deep copy; False where hooks are closures over the model, so that eager's copy does not train.
    """

    model: nn.Module
    batches: tuple[Batch, ...]
    loss: Loss = output_loss
    forward: Forward | None = None
    before_step: Callable[[nn.Module, int], None] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    extra: nn.Module | None = None
    copied: bool = True
    left_out: tuple[str, ...] = ()

    def run(self, module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        """One forward of the training loop: (output, loss)."""
        if self.forward is not None:
            return self.forward(module, batch)
        out = module(*batch.args, **batch.kwargs)
        return out, self.loss(module, out, batch.target)


def batches(make: Callable[[], Batch]) -> tuple[Batch, ...]:
    """New data for every step."""
    return tuple(make() for _ in range(STEPS))


def on_output(function: Callable[..., torch.Tensor]) -> Loss:
    """A loss of (output, target), such as F.mse_loss, as a `Loss`."""
    return lambda module, out, target: function(out, target)


@dataclass(frozen=True, slots=True)
class Case:
    """A named builder; its packages are imported when it is called.

    Attributes:
        name: "package/model".
        requirement: distribution name of the package.
        home: module that defines it.
        precisions: those that it trains in without a plan.
    """

    name: str
    requirement: str
    home: str
    make: Callable[[], Setup]
    precisions: tuple[str, ...] = PRECISIONS

    def build(self) -> Setup:
        """The model and its data, always the same."""
        seed_all(0)
        setup = self.make()
        setup.model.train()
        return setup


class Registry(dict[str, Case]):
    """Cases of one file by name; decorate builders with `registry("package")`."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = home

    def __call__(
        self, requirement: str, precisions: tuple[str, ...] = PRECISIONS
    ) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
        def register(make: Callable[[], Setup]) -> Callable[[], Setup]:
            name = f"{requirement}/{make.__name__}"
            if name in self:
                raise ValueError(f"{name} is there twice")
            self[name] = Case(name, requirement, self._home, make, precisions)
            return make

        return register


def load(homes: tuple[str, ...]) -> dict[str, Case]:
    """All cases of these modules, each of which has a Registry called `CASES`."""
    cases: dict[str, Case] = {}
    for home in homes:
        found: Registry = import_module(home).CASES
        if twice := cases.keys() & found.keys():
            raise ValueError(f"{sorted(twice)[0]} is there twice")
        cases |= found
    return cases


def seed_all(seed: int) -> None:
    """Torch's, Python's and numpy's global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
