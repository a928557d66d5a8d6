"""Other tensors in a call's arguments or output; its lists and dictionaries stay the same ones, which code around may hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from planner._compat import pytree
from planner.kernels.calls import like
from planner.tracer.host.values import items_of


def replaced(value: Any, other: Callable[[torch.Tensor], torch.Tensor], changed: list[Any]) -> Any:
    """A tree with other tensors in it.

    Args:
        other: what takes a tensor's place, or the tensor itself; called for each place.
        changed: the lists and dictionaries that are written into for that are added here.
    """
    if isinstance(value, torch.Tensor):
        return other(value)
    if isinstance(value, (dict, list, deque)) and pytree.children(value) is not None:
        if put_into(value, other, changed):
            changed.append(value)
        return value
    if type(value) is tuple or hasattr(type(value), "_fields"):
        items = [replaced(item, other, changed) for item in value]
        return value if all(item is own for item, own in zip(items, value, strict=True)) else like(value, items)
    return pytree.tree_map_only(torch.Tensor, other, value)


def put_into(container: Any, other: Callable[[torch.Tensor], torch.Tensor], changed: list[Any]) -> bool:
    """Write other tensors into a list or dictionary, and into those in it; whether that has changed it itself."""
    items = [(key, item, replaced(item, other, changed)) for key, item in items_of(container)]
    differ = [(key, new) for key, item, new in items if new is not item]
    for key, new in differ:
        container[key] = new
    return bool(differ)
