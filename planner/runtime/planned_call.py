"""How a planned module is called: its `forward`, with the signature of the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partialmethod
from typing import Any

import torch
from torch import nn

from planner._compat.switches import has_global_hooks

runs_as_planned: Callable[[Any], Any] = torch.compiler.disable(
    reason="a planned step runs as it was planned; to have it compiled, plan(..., compile=True)"
)
"""Decorator: torch.compile does not trace into a planned call."""


def unplanned_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, also while plans are installed in its place."""
    return getattr(model.forward, "unplanned", model.forward)  # type: ignore[no-any-return]


def _with_signature(forward: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """The method `forward`, with the signature of the model's own where that can be read."""

    @runs_as_planned
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    with suppress(TypeError, ValueError):  # what is written in C may have no signature
        own = inspect.signature(unplanned_forward(model))
        first = next(iter(own.parameters.values()), None)
        is_only_by_position = first is not None and first.kind is first.POSITIONAL_ONLY
        kind = inspect.Parameter.POSITIONAL_ONLY if is_only_by_position else inspect.Parameter.POSITIONAL_OR_KEYWORD
        this = inspect.Parameter("self", kind)
        signed.__signature__ = own.replace(parameters=[this, *own.parameters.values()])  # type: ignore[attr-defined]
    return signed


_CONTAINER = ("__getitem__", "__setitem__", "__delitem__", "__len__", "__iter__", "__contains__", "__reversed__")
_OWN = ("forward", "state_dict", "load_state_dict", "__call__", "__getattr__", "__setattr__", "__delattr__")
"""What planned modules define themselves."""


def resemble(kind: type, model: nn.Module) -> None:
    """Let a planned module's own class have what Python and trainers look up in the class of its model.

    These are the signature of its forward (trainers drop the columns of a batch that it does not name), the methods of
    containers (nn.Sequential), and the methods of nn.Module that the model overrides (a `train` that keeps batch norm in
    evaluation). Other attributes are found by `__getattr__`.

    Args:
        kind: the class of this one planned module, which torch.fx makes.
    """
    kind.forward = _with_signature(kind.forward, model)  # type: ignore[attr-defined]
    overridden = [name for name in vars(nn.Module) if name not in _OWN and not name.startswith("_") and _overrides(model, name)]
    for name in (*_CONTAINER, *overridden):
        if callable(getattr(type(model), name, None)):
            setattr(kind, name, partialmethod(_of_original, name))


class HooksOfModel:
    """Hooks as around a call of the model: it shares what torch keeps beside the dictionaries of hooks, and calls the model.

    Hooks of all modules are given the module that is called. No plan runs under them, so that is the model.
    """

    @runs_as_planned
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the planned module; where there are hooks of all modules, the model."""
        if has_global_hooks():
            return self.call_original(args, kwargs)  # type: ignore[attr-defined]
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    __call__.__signature__ = inspect.signature(nn.Module.__call__)  # type: ignore[attr-defined]

    @property
    def _is_full_backward_hook(self) -> bool | None:
        return self.original._is_full_backward_hook  # type: ignore[attr-defined, no-any-return]

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, now: bool | None) -> None:
        if "_step" in vars(self):  # nn.Module.__init__ sets it, too
            self.original._is_full_backward_hook = now  # type: ignore[attr-defined]


def _overrides(model: nn.Module, name: str) -> bool:
    return inspect.getattr_static(type(model), name) is not inspect.getattr_static(nn.Module, name)


def _of_original(module: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of the model; where it returns the model, the planned module."""
    out = getattr(module.original, name)(*args, **kwargs)
    return module if out is module.original else out
