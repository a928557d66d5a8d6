"""Deep copies of models on which a forward has left tensors with an autograd graph."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn


def with_left_tensors(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Extend a deep copy's memo: tensors that a forward left on modules are copied without their autograd graphs.

    copy.deepcopy refuses tensors that are not leaves of autograd, and most sparse ones.
    """
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
            elif held.layout is not torch.strided:  # deepcopy knows few of these
                copied = held.detach().clone().requires_grad_(held.requires_grad)
                memo.setdefault(
                    id(held), nn.Parameter(copied, held.requires_grad) if isinstance(held, nn.Parameter) else copied
                )
        elif isinstance(held, (list, tuple, deque)):
            todo += held
        elif isinstance(held, dict):
            todo += held.values()
    return memo
