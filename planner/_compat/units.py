"""What unit capture needs of torch's private parts."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_OWN_ATTRIBUTES = frozenset({"elem"})
"""What torch sets on the tensors of a trace."""


class BlankTensor(torch.Tensor):
    """Looks like a tensor and has no data and no kernels: a dispatch mode must be active that answers for them.

    Attributes:
        num_errors: how often a kernel was called without one.
    """

    num_errors = 0

    @staticmethod
    def __new__(cls, form: Any, offset: int) -> BlankTensor:
        made: BlankTensor = torch.Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride, storage_offset=offset, dtype=form.dtype, device=form.device
        )
        return made

    def __init__(self, form: Any, offset: int) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"BlankTensor({list(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        BlankTensor.num_errors += 1
        raise BlankError(f"{func} is called on a tensor without data")


class BlankError(Exception):
    """A tensor without data got to where kernels run."""


def blank(form: Any, offset: int = 0) -> torch.Tensor:
    """A tensor without data. `form` has its shape, stride, dtype and device; `offset` in elements."""
    return BlankTensor(form, offset)


def has_attributes(tensor: torch.Tensor) -> bool:
    """The model's code has set an attribute on a traced tensor."""
    return bool(vars(tensor).keys() - _OWN_ATTRIBUTES)


def has_saved_tensor_hooks() -> bool:
    """Hooks on tensors that are saved for the backward are active (torch.utils.checkpoint, offloading)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_tracing_graph() -> bool:
    """A graph is being recorded; torch runs the forward before, to learn about its inputs and outputs."""
    return get_proxy_mode() is not None


def fake_view(mode: FakeTensorMode, like: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> torch.Tensor:
    """A fake tensor that looks like another one, in a storage of the meta device, at an offset in elements; under no mode."""
    elem = torch.empty(0, dtype=like.dtype, device="meta").set_(storage, offset, like.shape, like.stride())
    return FakeTensor(mode, elem, like.device)
