"""Identity and likeness of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage: equal for a fake tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


_INDICES = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a tensor is made of: itself, or the indices and values of a sparse one; no other layout's."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _INDICES:
        return [*(getattr(tensor, name)() for name in _INDICES[tensor.layout]), tensor.values()]
    return [tensor] if tensor.layout is torch.strided else []


def address_of(tensor: torch.Tensor) -> int | None:
    """Where a tensor's values lie in memory; None where they lie in no memory of its own, as under vmap.

    Autograd adds to dense gradients in place, and makes new values for a sum of sparse ones.
    """
    parts = dense_parts(tensor)
    try:
        return parts[-1].data_ptr() if parts else None
    except RuntimeError:
        return None


def tensors_alike(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], bool]:
    """A quick check whether other tensors are of the same type, shape, strides, dtype, device and requires_grad as these.

    False may also mean that the thread's dispatch state (autocast, ...) is another one. Dynamo's own check, 0.1 us a tensor;
    where torch has none, the answer is always False.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    if guards is None or not hasattr(guards, "TensorGuards"):
        return lambda others: False
    check = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return lambda others: bool(check(*others))


def is_dense(tensor: torch.Tensor) -> bool:
    """The tensor has a shape and strides: it is neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def storage_of(tensor: torch.Tensor) -> int | None:
    """Which storage a tensor is in; None where it is not strided."""
    return storage_id(tensor) if tensor.layout is torch.strided else None


def shared_storages(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Per tensor, the position of the first one in the same storage."""
    first: dict[int, int] = {}
    storages = [-1 - i if (found := storage_of(tensor)) is None else found for i, tensor in enumerate(tensors)]
    return tuple(first.setdefault(storage, i) for i, storage in enumerate(storages))
