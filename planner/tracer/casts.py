"""Casts by autocast while the model is traced.

Autocast casts a weight once, however often it is used; a trace casts it at every use. The bits differ: eager sums the uses'
gradients in the low precision and casts the sum. The trace notes which casts share one in eager; the pass `merge_casts` makes
the joint graph do what eager does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from planner.errors import CaptureError
from planner.tracer.opaque.call import OpaqueCall, opaque_call_of

TO_COPY = torch.ops.aten._to_copy.default
NARROW = (torch.bfloat16, torch.float16)
_CONVERSIONS = frozenset(
    {torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.float}
)


class AutocastCasts(TorchFunctionMode):
    """Tells autocast's casts from the user's, while the model is traced.

    Args:
        are_cached: autocast's cache is enabled where the model is called. Tracing itself disables it.

    Attributes:
        num_clears: how often autocast's cache was cleared so far.
    """

    def __init__(self, are_cached: bool) -> None:
        super().__init__()
        self._are_cached = are_cached
        self._converting = 0
        self.num_clears = 0
        self._without_grad: set[tuple[int, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CONVERSIONS:
            return func(*args, **(kwargs or {}))
        self._converting += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._converting -= 1

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """While entered, autocast's cache is followed: when it forgets its casts, and where the model switches it off."""
        names = ("clear_autocast_cache", "is_autocast_cache_enabled", "set_autocast_cache_enabled")
        clear, enabled, enable = (getattr(torch, name) for name in names)

        def counted() -> None:
            self.num_clears += 1
            clear()

        def followed(now: bool) -> None:
            self._are_cached = now

        for name, function in zip(names, (counted, lambda: self._are_cached, followed), strict=True):
            setattr(torch, name, function)
        try:
            with self:
                yield
        finally:
            for name, function in zip(names, (clear, enabled, enable), strict=True):
                setattr(torch, name, function)

    def context_of(self, func: Any, args: Any, kwargs: Any) -> int | None:
        """For a cast by autocast, the number of the context in which eager would cache it; None for other kernels.

        Raises:
            CaptureError: a weight is first cast without gradient: eager would then lose its gradient.
        """
        if func is not TO_COPY or self._converting or (kwargs or {}).get("dtype") not in NARROW:
            return None
        if args[0].dtype is not torch.float32 or not self._are_cached:
            return None
        key = (id(args[0]), self.num_clears)
        if not torch.is_grad_enabled():
            self._without_grad.add(key)
        elif key in self._without_grad and args[0].requires_grad:
            raise CaptureError(
                "a weight is used under autocast first without gradient (torch.no_grad), then with it, in one context: eager "
                "reuses the first cast and loses the gradient. Use autocast(..., cache_enabled=False), or two contexts"
            )
        return self.num_clears


def is_cast(weight: fx.Node, calls: Mapping[str, OpaqueCall]) -> bool:
    """A weight of a joint graph is cast to a narrow dtype: by a kernel, or in an opaque module that runs under autocast.

    Args:
        calls: recorded calls of opaque modules, by key.
    """
    return any(
        (user.target is TO_COPY and user.kwargs.get("dtype") in NARROW)
        or ((call := opaque_call_of(user, calls)) is not None and call.autocast[0])
        for user in weight.users
    )
