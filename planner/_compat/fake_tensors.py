"""Tensors without data: how they are made, and what they do otherwise than torch's, so that they look as the real ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from planner.kernels import observed

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "InPlaceCollectiveError",
    "UnsupportedOperatorException",
    "fake_inputs",
    "fake_mode",
    "forget_real_tensors",
    "stand_ins",
]


class InPlaceCollectiveError(Exception):
    """A traced call communicates by one of torch.distributed's operators that write in place, which no graph can hold."""


FOLLOWS_OBSERVED: ContextVar[bool] = ContextVar("fake tensors follow what was observed on this machine", default=True)


FOREIGN_CALLS: ContextVar[set[Any] | None] = ContextVar("operators from outside of torch that were traced", default=None)


_OF_LIKE_STORAGE = frozenset(
    {
        torch.ops.aten.copy.default,
        torch.ops.aten.slice_scatter.default,
        torch.ops.aten.select_scatter.default,
        torch.ops.aten.diagonal_scatter.default,
        torch.ops.aten.as_strided_scatter.default,
    }
)
"""Kernels whose result has a storage as large as their argument's, at its offset. The cache of fake tensors, which does not see
storages, returns a smaller one the second time, so that a second capture would differ from the first."""


def fake_mode() -> FakeTensorMode:
    """While entered, tensors are made without data; real ones, as a model's own constants, are let in.

    Fake tensors look as the real ones do, where a kernel was seen to return other strides than its fake (profiler/observed.py).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own, caches = mode.dispatch, mode.cache_enabled

    def empty(look: observed.TensorLayout, device: torch.device) -> torch.Tensor:
        with mode:
            return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device=device)

    def dispatch(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "c10d":
            raise InPlaceCollectiveError(str(func))
        kept = FOREIGN_CALLS.get()
        if kept is not None and observed.is_foreign(func):
            kept.add(func)
        mode.cache_enabled = caches and func not in _OF_LIKE_STORAGE
        try:
            out = own(func, types, args, kwargs or {})
        finally:
            mode.cache_enabled = caches
        if func is torch.ops.aten.bernoulli.p:  # the real kernel draws into an empty_like; the fake one is contiguous
            with mode:
                return torch.empty_like(args[0])
        if str(func) == "_c10d_functional.wait_tensor.default":  # the real one returns its argument, the fake one a copy
            with mode:
                return torch.ops.aten.alias.default(args[0])
        return observed.as_observed(func, args, kwargs or {}, out, empty) if FOLLOWS_OBSERVED.get() else out

    mode.dispatch = dispatch  # type: ignore[method-assign]  # not a subclass: higher-order operators look for this very type
    return mode


def forget_real_tensors(fakes: Iterable[Any]) -> None:
    """Drop the weak references that the modes of fake tensors hold to the real tensors they stand for.

    torch.utils.swap_tensors, which `Module.to` and `load_state_dict` may use, refuses tensors with weak references.
    """
    for mode in {id(fake.fake_mode): fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)}.values():
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def fake_inputs(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stand-ins without data, static in shape, under one mode: that of the tensors which are fake already, as these stay."""
    mode = _mode_of(tensors)
    return [t if isinstance(t, FakeTensor) else mode.from_tensor(t, static_shapes=True) for t in tensors]


def stand_ins(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake CPU tensors that look like these, which may be real, fake or on the meta device; one for a tensor given twice."""
    with _mode_of(tensors):
        made = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in tensors}
    return [made[id(t)].requires_grad_(t.requires_grad) for t in tensors]


def _mode_of(tensors: Sequence[torch.Tensor]) -> FakeTensorMode:
    return next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None) or fake_mode()
