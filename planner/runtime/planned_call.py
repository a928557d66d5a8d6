"""How a planned module is called: its `forward`, with the signature of the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import torch
from torch import nn

runs_as_planned: Callable[[Any], Any] = torch.compiler.disable(
    reason="a planned step runs as it was planned; to have it compiled, plan(..., compile=True)"
)
"""Decorator: torch.compile does not trace into a planned call."""


def unplanned_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, also while plans are installed in its place."""
    return getattr(model.forward, "unplanned", model.forward)  # type: ignore[no-any-return]


class PlannedCall:
    """The attribute `forward` of a planned module: a function with the signature of the model's own forward.

    Trainers drop the columns of a batch that the signature does not name.
    """

    def __get__(self, module: Any, owner: Any) -> Any:
        if module is None:
            return owner.run
        bound = partial(module.run)
        bound.__signature__ = inspect.signature(unplanned_forward(module.original))  # type: ignore[attr-defined]
        return bound


_CONTAINER = ("__getitem__", "__setitem__", "__delitem__", "__len__", "__iter__", "__contains__", "__reversed__")


def forward_container(kind: type, model: nn.Module) -> None:
    """Let a planned module's own class be a container where the model is one (nn.Sequential): Python looks these up in classes.

    Args:
        kind: the class of this one planned module.
    """
    for name in _CONTAINER:
        if hasattr(type(model), name):
            setattr(kind, name, partialmethod(_of_original, name))


def _of_original(module: Any, name: str, *args: Any) -> Any:
    return getattr(module.original, name)(*args)
