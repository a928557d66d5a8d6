"""Kernels that a trace runs in place of torch's decompositions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._meta_registrations
from torch._ops import OpOverload

# Kernels for which torch registers a Python decomposition that differs from what eager runs. Left out on
# purpose: LSTM and GRU, which cannot be traced fused, and native_batch_norm, whose functional form is exact
# and says what it writes.
_KEPT_KERNELS = (
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_upsample_lanczos2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "cudnn_batch_norm",
    "dropout",
    "hardshrink",
    "matmul",
    "miopen_batch_norm",
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "softshrink",
    "upsample_bicubic2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_trilinear3d",
)


_REPLACING_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


@contextlib.contextmanager
def kernels_kept() -> Iterator[None]:
    """While tracing, keep the kernels eager runs: torch's Python decompositions of them step aside."""
    removed: list[tuple[Any, Any, Callable[..., Any]]] = []
    try:
        for name in _KEPT_KERNELS:
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                op = getattr(packet, overload)
                for key in _REPLACING_KEYS:
                    if key in op.py_kernels:
                        removed.append((op, key, op.py_kernels.pop(key)))
                        op._dispatch_cache.clear()
        yield
    finally:
        for op, key, kernel in removed:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextlib.contextmanager
def kernels_chosen(choices: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """While tracing, the composite operators in `choices` run what stands there, on every device."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    before = {op: op.py_kernels.get(key) for op in choices}
    try:
        for op, choice in choices.items():
            op.py_kernels[key] = choice
            op._dispatch_cache.clear()
        yield
    finally:
        for op, kernel in before.items():
            op.py_kernels.pop(key, None)
            if kernel is not None:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextlib.contextmanager
def kernels_replaced(replacements: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """While tracing, these operators run what stands there instead, in the backward too."""
    keys = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.AutogradMeta)
    before = {(op, key): op.py_kernels.get(key) for op in replacements for key in keys}
    try:
        for op, key in before:
            op.py_kernels[key] = replacements[op]
            op._dispatch_cache.clear()
        yield
    finally:
        for (op, key), kernel in before.items():
            op.py_kernels.pop(key, None)
            if kernel is not None:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextlib.contextmanager
def grouped_mm_of_any_dtype() -> Iterator[None]:
    """While tracing, the fake grouped matmul (for experts) takes float32, as the real one does; before 2.15 it does not."""
    home = torch._meta_registrations
    names = ("_meta_grouped_mm_common", "_create_grouped_mm_output_tensor")
    if not all(hasattr(home, name) for name in names):
        yield
        return
    checked, made = (getattr(home, name) for name in names)

    def common(mat_a: Any, mat_b: Any, scale_a: Any = None, scale_b: Any = None, offs: Any = None, **options: Any) -> Any:
        if scale_a is None and scale_b is None and mat_a.dtype is mat_b.dtype is torch.float32:
            return made(mat_a, mat_b, offs, options.get("out_dtype"))
        return checked(mat_a, mat_b, scale_a=scale_a, scale_b=scale_b, offs=offs, **options)

    home._meta_grouped_mm_common = common  # type: ignore[assignment]
    try:
        yield
    finally:
        home._meta_grouped_mm_common = checked
