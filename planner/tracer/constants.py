"""Tensors that a forward computes from shapes alone: their values are known even where the model has none."""

from __future__ import annotations

from typing import Any

import torch

from planner._compat import pytree
from planner._compat.dispatch import OpOverload, untraced


class Constants:
    """What a trace has made of nothing but numbers so far, and how; values are computed when they are asked for."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, int, tuple[Any, Any, Any]]] = {}  # the tensor too: ids are used again

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A kernel was called. One that writes into a constant ends all that is known: nobody follows the views."""
        known = [id(tensor) in self._made for tensor in _tensors((args, kwargs))]
        if not isinstance(func, OpOverload):
            return
        if func._schema.is_mutable:
            if any(known):
                self._made.clear()
        elif all(known) and torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in func.__name__:
            for position, tensor in enumerate(_tensors(out)):
                self._made[id(tensor)] = (tensor, position, (func, args, kwargs))

    def value(self, tensor: Any) -> bool | int | float | complex | None:
        """The number in a traced tensor; None where it is no constant."""
        if id(tensor) not in self._made:
            return None
        with untraced(), torch.no_grad():
            return self._compute(tensor).item()

    def _compute(self, tensor: Any) -> torch.Tensor:
        _, position, (func, args, kwargs) = self._made[id(tensor)]
        given = pytree.tree_map(lambda leaf: self._compute(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        return _tensors(func(*given[0], **given[1]))[position]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
