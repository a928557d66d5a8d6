"""Gradients that a step finds: those of earlier micro-steps, or zeros that were left in place of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.errors import warn
from planner.graph.accumulation import num_stages
from planner.results.plan import Plan
from planner.runtime.executable import Executable
from planner.units import format_bytes

RESERVED = "(reserved)"
"""The value of `reserve=`, which may be meant for them."""


class FoundGradients:
    """Says once that a plan does not count the gradients that its step finds, where they may exceed the budget."""

    def __init__(self, plan: Plan, name: str) -> None:
        self._plan, self._name = plan, name
        self._looks = not num_stages(plan.graph)

    def look(self, executable: Executable, inputs: Sequence[torch.Tensor]) -> None:
        """Look at the parameters of a planned call; `inputs`: of the forward graph."""
        if not self._looks:
            return
        owners = [inputs[i] for i in executable.owners[-1] if inputs[i].is_leaf]
        if not owners or owners[-1].grad is None:
            return
        gradients = [inputs[i].grad for owned in executable.owners for i in owned if inputs[i].is_leaf]
        nbytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        reserved = sum(value.nbytes for value in self._plan.graph.values if value.name == RESERVED)
        needed = self._plan.peak_bytes + max(0, nbytes - reserved)
        if needed <= self._plan.budget_bytes:
            return
        self._looks = False
        warn(
            f"{self._name}: clear gradients by zero_grad(set_to_none=True) before each step, or plan(..., accumulate=True): "
            f"this step finds {format_bytes(nbytes)} of gradients, which its plan does not count. It may need up to "
            f"{format_bytes(needed)}, and the budget is {format_bytes(self._plan.budget_bytes)}"
        )
