"""Gradients that a step finds: those of earlier micro-steps, or zeros that were left in place of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from planner._compat.backward_state import in_backward
from planner.errors import warn
from planner.graph.accumulation import HELD
from planner.results.plan import Plan
from planner.runtime.executable import Executable
from planner.units import format_bytes


class FoundGradients:
    """Says once that a plan does not count the gradients that its step finds, where they may exceed the budget."""

    def __init__(self, plan: Plan, name: str, parameters: Sequence[torch.Tensor] = ()) -> None:
        """`parameters`: all that the plan's step trains, where a call has a part of them."""
        self._plan, self._name, self._parameters = plan, name, parameters
        self._looks = HELD not in plan.graph.value

    @cached_property
    def _fitting_bytes(self) -> int:
        return self._plan.free_bytes

    def look(self, executable: Executable, inputs: Sequence[torch.Tensor]) -> None:
        """Look at the parameters of a planned call; sparse gradients, whose size says nothing of the next, are left out.

        Args:
            inputs: of the forward graph.
        """
        if not self._looks or in_backward():  # a forward that checkpointing runs again finds what this backward has made
            return
        if self._parameters:
            gradients = [parameter.grad for parameter in self._parameters]
        else:
            owned = {i for stage in executable.owners for i in stage}
            gradients = [inputs[i].grad for i in owned if inputs[i].is_leaf]
        nbytes = sum(gradient.nbytes for gradient in gradients if gradient is not None and gradient.layout is torch.strided)
        if not nbytes or nbytes <= self._fitting_bytes:
            return
        self._looks = False
        needed = self._plan.budget_bytes + nbytes - self._fitting_bytes
        warn(
            f"{self._name}: clear gradients by zero_grad(set_to_none=True) before each step, or plan(..., accumulate=True): "
            f"this step finds {format_bytes(nbytes)} of gradients, which its plan does not count. It may need up to "
            f"{format_bytes(needed)}, and the budget is {format_bytes(self._plan.budget_bytes)}"
        )
