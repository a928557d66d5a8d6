"""The training loop that both sides run: AdamW, autocast or not, new data every step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.field.case import Batch, Case, Setup, seed_all
from benchmarks.field.state import differences, flat, generators, gradients, module_state

SEED = 7
BUDGET = 0.7
"""Share of the plain step's peak that models are planned for."""
SOLVER_S = 3.0
"""Effort of the solver for one model."""


@dataclass
class Trajectory:
    """What a training run left behind, step by step.

    Attributes:
        steps: per step, everything that can be compared, by name.
        misses: per step, why it did not run planned; "" if it did.
        warned: what the planner warned of beside mismatches.
        error: what ended the run, if anything did.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    error: Exception | None = None


def cast(precision: str) -> Any:
    """The context that forward and loss run in."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def fresh(case: Case) -> tuple[Setup, nn.Module]:
    """A new setup with a deep copy of its model, or the model itself where it cannot be copied."""
    setup = case.build()
    return setup, copy.deepcopy(setup.model) if setup.copied else setup.model


def train(setup: Setup, module: nn.Module, precision: str, why_unplanned: Callable[[Batch], str] | None = None) -> Trajectory:
    """Train for one step per batch. `why_unplanned` says of a call whether, and why, it will not run planned."""
    run = Trajectory()
    trained = [p for p in (*module.parameters(), *(setup.extra.parameters() if setup.extra else ())) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    seed_all(SEED)
    for step, batch in enumerate(setup.batches):
        batch = copy.deepcopy(batch)
        # a reason is warned of once: from the first mismatch on, the planned module is asked
        foreseen = why_unplanned(batch) if any(run.misses) and why_unplanned is not None else ""
        try:
            with _planner_warnings() as caught:
                run.steps.append(_step(setup, module, batch, optimizer, step, precision))
        except Exception as error:  # whatever a model raises is what this benchmark is about
            run.error = error
            return run
        misses = [text for name, text in caught if name == "MismatchWarning"]
        run.warned += [f"{name}: {text}" for name, text in caught if name != "MismatchWarning"]
        run.misses.append(misses[0] if misses else foreseen)
    return run


def _step(
    setup: Setup, module: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, step: int, precision: str
) -> dict[str, Any]:
    """One step of the loop; everything that it leaves behind."""
    held = getattr(module, "original", module)
    if setup.before_step is not None:
        setup.before_step(module, step)
    with cast(precision):
        out, loss = setup.run(module, batch)
    loss.backward()
    outputs = {name: value for name, value in flat("output", out).items() if not name.startswith(setup.left_out)}
    found = {"loss": loss.detach().clone(), **outputs, **gradients(held)}
    inputs = [leaf for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(leaf, torch.Tensor)]
    found |= {f"input gradient {i}": leaf.grad.clone() for i, leaf in enumerate(inputs) if leaf.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    del out, loss
    if setup.after_step is not None:
        setup.after_step(module, step)
    found |= flat("input", (batch.args, dict(batch.kwargs)))
    found |= module_state(held)
    if setup.extra is not None:
        found |= {f"loss's {name}": value for name, value in module_state(setup.extra).items()}
    return found | generators()


@contextmanager
def _planner_warnings() -> Iterator[list[tuple[str, str]]]:
    """(class, message) of the planner's own warnings; those of models are dropped."""
    found: list[tuple[str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [
        (warning.category.__name__, str(warning.message))
        for warning in caught
        if warning.category.__module__.partition(".")[0] == "planner"
    ]


def first_difference(expected: Trajectory, found: Trajectory) -> str:
    """What differs in the first step in which anything does; '' if nothing does. Says so where it is attributes alone."""
    steps = [differences(one, other) for one, other in zip(expected.steps, found.steps, strict=False)]
    first = next((i for i, off in enumerate(steps) if off), None)
    if first is None:
        return ""
    off = steps[first]
    more = f" and {len(off) - 4} more" if len(off) > 4 else ""
    alone = all(name.startswith("attribute ") for names in steps for name in names)
    return f"step {first}: {', '.join(off[:4])}{more}{'; all else is equal in all steps' if alone else ''}"
