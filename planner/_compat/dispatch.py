"""Operators as torch dispatches them: their types, modes that see each call, and what a call writes into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as untraced

from planner._compat import pytree

__all__ = ["HigherOrderOperator", "OpOverload", "TorchDispatchMode", "is_traced", "keep_layout", "untraced", "written"]


def is_traced(value: Any) -> bool:
    """A tensor of a trace, which has no data."""
    return isinstance(value, (FakeTensor, FunctionalTensor))


def keep_layout(tensor: torch.Tensor) -> None:
    """Give a traced tensor that a kernel has written into the layout back that it has in eager.

    Functionalization replaces a write (`x.masked_fill_`) by a kernel that returns a new tensor (`masked_fill`), which may be
    laid out otherwise than `x`; the kernels that read it may then be others, with other bits.
    """
    if not isinstance(tensor, FunctionalTensor) or tensor.layout is not torch.strided:
        return
    torch._sync(tensor)
    if torch._from_functional_tensor(tensor.elem).stride() == tensor.stride():
        return
    fresh: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    fresh.copy_(tensor)
    functional = tensor.elem
    torch._functionalize_replace(functional, torch._from_functional_tensor(fresh.elem))
    torch._functionalize_commit_update(functional)
    torch._sync(tensor)


def written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call writes into, by its schema."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | dict(kwargs)
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = pytree.tree_leaves([given.get(name) for name in names])
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
