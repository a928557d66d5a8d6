"""Copies of a model that a forward has left tensors on."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn


def with_left_tensors(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """A deep copy's memo in which tensors that a forward left on modules are copied without their autograd graphs."""
    todo = [value for module in model.modules() for value in vars(module).values()]
    seen: set[int] = set()
    while todo:
        held = todo.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, torch.Tensor):
            if held.grad_fn is not None:
                memo[id(held)] = held.detach().clone().requires_grad_()
        elif isinstance(held, (list, tuple, deque)):
            todo += held
        elif isinstance(held, dict):
            todo += held.values()
    return memo
