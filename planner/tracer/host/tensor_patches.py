"""Reads and writes of attributes of tensors, sent through functions while a forward runs."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from planner._compat.private_names import READ_BY_TORCH
from planner.tracer.faults import calls_users_code
from planner.tracer.host.scopes import is_library_code

_ATTRIBUTES = frozenset(
    {
        "grad",
        "_grad",
        "grad_fn",
        "is_leaf",
        "retains_grad",
        "output_nr",
        "names",
        "name",
        "_version",
        "_base",
        "_cdata",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "__dict__",
    }
)
METHODS = frozenset(
    {
        "data_ptr",
        "storage_offset",
        "storage",
        "untyped_storage",
        "is_shared",
        "is_pinned",
        "is_inference",
        "is_conj",
        "is_neg",
        "_is_view",
    }
)
"""Methods without arguments whose results count as read where they are looked up."""
_IGNORED = (frozenset(dir(torch.Tensor)) - _ATTRIBUTES - METHODS) | READ_BY_TORCH
"""What follows from a tensor's form, which the key of a plan holds, or computes: not noted."""
get_attribute = torch.Tensor.__getattribute__
"""Reads past the patch."""
_setter = torch.Tensor.__setattr__
_deleter = torch.Tensor.__delattr__


def _tolist(this: torch.Tensor) -> Any:
    return this.item() if this.dim() == 0 else [_tolist(row) for row in this.unbind()]


_dlpack = torch.Tensor.__dlpack__


def _dlpack_as_numpy(this: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    this.numpy()
    return _dlpack(this, *args, **kwargs)


_BY_KERNELS = {"tolist": _tolist, "__dlpack__": _dlpack_as_numpy}
"""Methods that read a tensor's memory unseen, by what recorders and traces see: `item()`, `numpy()`."""


@contextlib.contextmanager
def patched(
    read: Callable[[torch.Tensor, str, types.FrameType], Any],
    write: Callable[[torch.Tensor, str, types.FrameType], None],
) -> Iterator[None]:
    """While entered, reads and writes of tensors' attributes that do not follow from their form go through these functions.

    Methods that read memory go by way of kernels.
    """

    of_library: dict[int, types.CodeType] = {}  # by identity: a code object computes its hash each time

    @calls_users_code
    def get(this: Any, name: str) -> Any:
        if name in _IGNORED:
            return get_attribute(this, name)
        frame = sys._getframe(1)
        if name != "grad":  # torch's own code reads thousands of attributes of traced tensors
            if id(frame.f_code) in of_library:
                return get_attribute(this, name)
            if is_library_code(frame.f_code):
                of_library[id(frame.f_code)] = frame.f_code
        return read(this, name, frame)

    @calls_users_code
    def put(this: Any, name: str, value: Any) -> None:
        if name not in _IGNORED:
            write(this, name, sys._getframe(1))
        _setter(this, name, value)

    @calls_users_code
    def delete(this: Any, name: str) -> None:
        if name not in _IGNORED:
            write(this, name, sys._getframe(1))
        _deleter(this, name)

    patches = {"__getattribute__": get, "__setattr__": put, "__delattr__": delete, **_BY_KERNELS}
    others = {name: vars(torch.Tensor)[name] for name in patches if name in vars(torch.Tensor)}
    for name, patch in patches.items():
        setattr(torch.Tensor, name, patch)
    try:
        yield
    finally:
        for name in patches:
            delattr(torch.Tensor, name)
        for name, other in others.items():
            setattr(torch.Tensor, name, other)
