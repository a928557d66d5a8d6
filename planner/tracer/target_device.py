"""A trace for a device that is not here, with the kernels that CUDA chooses.

torch chooses by the tensors' device where an operator is composite, and a torch without CUDA cannot differentiate on CUDA's
fake tensors at all. So the trace runs on fake CPU tensors, and composite operators are replaced by what they run on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner._compat.autocast import as_on_cuda
from planner._compat.dispatch import OpOverload
from planner._compat.joint_export import ExportedJoint
from planner.tracer.casts import TO_COPY

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TargetDevice:
    """What decides which kernels a device runs.

    Attributes:
        name: for messages.
        capability: its CUDA compute capability; None for a CPU, which runs the kernels that run here.
        autocast: the model's forward runs under autocast of this dtype there; None where it does not.
    """

    name: str
    capability: tuple[int, int] | None
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return torch.device("cpu") if self.capability is None else torch.device("cuda", 0)

    def autocasting(self) -> AbstractContextManager[None]:
        """A context for tracing under the device's autocast."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", self.autocast) if self.capability is None else as_on_cuda(self.autocast, TO_COPY)

    @property
    def choices(self) -> Mapping[OpOverload, Callable[..., Any]]:
        """The composite operators whose kernels depend on the device, and what CUDA runs."""
        if self.capability is None:
            return {}
        return {
            aten.scaled_dot_product_attention.default: partial(_attention, self.capability),
            aten.dropout.default: _dropout,
            aten.batch_norm.default: _batch_norm,
        }

    def corrected(self, exported: ExportedJoint) -> ExportedJoint:
        """A trace with these choices, corrected where fake tensors on a CPU still differ from CUDA's.

        CUDA's layer norm keeps mean and deviation of a half-precision tensor in float32, a CPU's in the tensor's own dtype.
        """
        if self.capability is None:
            return exported
        for node in exported.graph_module.graph.find_nodes(op="call_function", target=aten.native_layer_norm.default):
            out, *statistics = node.meta["val"]
            node.meta["val"] = (out, *(s.float() for s in statistics)) if out.dtype in _HALF else node.meta["val"]
            for item in node.users:
                item.meta["val"] = node.meta["val"][item.args[1]]
        return exported


def _attention(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    which = attention_kernel(capability, query, key, value, attn_mask, dropout_p, is_causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if which == "math":
        out = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    elif which == "flash":
        padded = [_padded(tensor) for tensor in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)
        return out[0][..., : query.shape[-1]] if padded[0] is not query else out[0]
    else:
        mask = _additive(attn_mask, query, key)
        kernel = getattr(aten, f"_scaled_dot_product_{which}_attention")
        out = kernel(query, key, value, mask, True, dropout_p, is_causal, scale=scale)
    return out[0]  # type: ignore[no-any-return]


def attention_kernel(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str:
    """Which of "cudnn", "flash", "efficient" and "math" torch runs, for training.

    The rules of `select_sdp_backend` (pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), those for dense
    tensors, with a cuDNN of 9.15.1 or later as torch's CUDA packages bring it. `torch.nn.attention.sdpa_kernel` holds.
    """
    backends, half = torch.backends.cuda, query.dtype in _HALF
    width, ampere = query.shape[-1], capability >= (8, 0)
    same_width = query.dim() == 4 and width == key.shape[-1] == value.shape[-1]
    if query.dim() == 4 and capability[0] in (9, 10) and backends.cudnn_sdp_enabled() and half:
        fits = max(width, value.shape[-1]) <= 128 and width % 8 == value.shape[-1] % 8 == 0 and key.shape[-2] > 1
        if fits and _takes_dropout(dropout_p) and not _strictly_deterministic():
            return "cudnn"
    if same_width and ampere and backends.flash_sdp_enabled() and half and mask is None and width <= 256:
        consumer = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
        wide = consumer and (192 < width <= 224 or (width > 224 and dropout_p > 0))
        if not wide and not (is_causal and query.shape[-2] != key.shape[-2]):
            return "flash"
    if query.dim() == 4 and backends.mem_efficient_sdp_enabled() and _runs_efficient(query.dtype, capability):
        aligned = 8 if half else 4 if ampere else 1
        if width == key.shape[-1] and width % aligned == value.shape[-1] % aligned == 0:
            return "efficient"
    return "math"


def _takes_dropout(p: float) -> bool:
    """cuDNN rounds p to sixteenths: torch 2.12 and later give it no other p (pytorch #174245), 2.11 did (seen on an H200)."""
    return (p * 16).is_integer() or torch.__version__ < "2.12"


def _strictly_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _runs_efficient(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    return dtype in (torch.float16, torch.float32) or (dtype is torch.bfloat16 and capability >= (8, 0))


def _padded(tensor: Tensor) -> Tensor:
    """Flash attention takes heads of a multiple of 8 channels."""
    missing = -tensor.shape[-1] % 8
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as fused kernels take it: to be added, one for each head."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.full_like(zero, float("-inf")))
    return mask.expand(*query.shape[:2], query.shape[-2], key.shape[-2])


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """CUDA draws and scales in one kernel, and keeps a mask of a byte an element."""
    if not train or p == 0 or x.numel() == 0:
        return x
    if p == 1:
        return x.mul(torch.zeros((), dtype=x.dtype, device=x.device))
    return aten.native_dropout(x, p, True)[0]  # type: ignore[no-any-return]


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """cuDNN's batch norm where it takes the call (pytorch, aten/src/ATen/native/Normalization.cpp), else torch's own."""
    statistics = (running_mean, running_var)
    known = all(s is not None for s in statistics) or (training and all(s is None for s in statistics))
    affine = weight is not None and bias is not None
    if cudnn_enabled and known and affine and x.dim() >= 3 and eps >= 1e-5 and x.dtype is not torch.float64:
        return aten.cudnn_batch_norm(x, weight, bias, *statistics, training, momentum, eps)[0]  # type: ignore[no-any-return]
    return aten.native_batch_norm(x, weight, bias, *statistics, training, momentum, eps)[0]  # type: ignore[no-any-return]
