"""Autocast as it is on CUDA, for a trace on a CPU's fake tensors.

CUDA's autocast casts for other operators than a CPU's does. While a trace for a CUDA device that is not here runs, the CPU's
autocast is on, and each operator that either of them knows does what CUDA's would do with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch._ops import OpOverload

from planner._compat import pytree

Rule = Callable[[OpOverload, tuple[Any, ...], dict[str, Any], torch.dtype], Any]

# The operators of torch/include/ATen/autocast_mode.h (torch 2.13): AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
# AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_PROMOTE; with all overloads that write no argument. Names, separated by spaces.
_LOWER = """
_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution prelu addmm
addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
_thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
_scaled_dot_product_flash_attention scaled_dot_product_attention
"""
_FLOAT32 = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm native_layer_norm
rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss
nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist
pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d
upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa norm
"""
_RESULT_FLOAT32 = """
prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum
"""
_WIDEST = """
addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat stack
"""

_KEY = torch._C.DispatchKey.AutocastCPU
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


_CASTS: ContextVar[tuple[torch.dtype, OpOverload] | None] = ContextVar("autocast is traced as on CUDA", default=None)
"""Its dtype, and the kernel that casts; None in a thread that trains under the CPU's autocast meanwhile."""


@contextlib.contextmanager
def as_on_cuda(dtype: torch.dtype, cast: OpOverload) -> Iterator[None]:
    """While entered, kernels on a CPU are traced as under `torch.autocast("cuda", dtype)`; in this thread alone.

    Args:
        cast: the kernel that autocast casts by, by which a trace tells its casts from the user's.
    """
    known_here, unknown_here = _rules()
    before = {op: op.py_kernels.get(_KEY) for op in known_here}
    # The dispatcher skips autocast for operators that the CPU's does not know, unless they have a kernel there.
    library = torch.library.Library("aten", "IMPL")
    token = _CASTS.set((dtype, cast))
    try:
        for op, rule in known_here.items():
            op.py_kernels[_KEY] = partial(_run, op, rule)
            op._dispatch_cache.clear()
        for op, rule in unknown_here.items():
            library.impl(op, partial(_run, op, rule), "AutocastCPU")
        with torch.autocast("cpu", dtype):
            yield
    finally:
        _CASTS.reset(token)
        library._destroy()
        for op, kernel in before.items():
            op.py_kernels.pop(_KEY, None)
            if kernel is not None:
                op.py_kernels[_KEY] = kernel
            op._dispatch_cache.clear()


@cache
def _rules() -> tuple[dict[OpOverload, Rule], dict[OpOverload, Rule]]:
    """What is done for each operator: those that the CPU's autocast knows, and those that only CUDA's does."""
    lists = ((_LOWER, _lower), (_FLOAT32, _float32), (_RESULT_FLOAT32, _result_float32), (_WIDEST, _widest))
    named: dict[str, Rule] = {name: rule for names, rule in lists for name in names.split()}
    known_here: dict[OpOverload, Rule] = {}
    unknown_here: dict[OpOverload, Rule] = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = qualified.partition("::")
        name, _, overload = rest.partition(".")
        is_known = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "AutocastCPU")
        if namespace != "aten" or not (is_known or name in named):
            continue
        op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if isinstance(op, OpOverload) and not op._schema.is_mutable:
            (known_here if is_known else unknown_here)[op] = named.get(name, _as_it_is)
    return known_here, unknown_here


def _run(op: OpOverload, rule: Rule, *args: Any, **kwargs: Any) -> Any:
    casts = _CASTS.get()
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
        return op(*args, **kwargs) if casts is None else rule(op, args, kwargs, casts[0])


def _as_it_is(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    return op(*args, **kwargs)


def _lower(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    args, kwargs = _cast((args, kwargs), dtype)
    return op(*args, **kwargs)


def _float32(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    args, kwargs = _cast((args, kwargs), torch.float32)
    return op(*args, **kwargs)


def _result_float32(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    first = args[0]
    takes_dtype = any(argument.name == "dtype" for argument in op._schema.arguments)
    position = next((i for i, argument in enumerate(op._schema.arguments) if argument.name == "dtype"), len(args))
    given = kwargs.get("dtype") if position >= len(args) else args[position]
    if takes_dtype and given is None and _is_castable(first):
        args, kwargs = (args[:position], kwargs | {"dtype": torch.float32})
    return op(*args, **kwargs)


def _widest(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_castable(leaf)]
    wide = torch.float32 if any(leaf.dtype is torch.float32 for leaf in leaves) else dtype
    args, kwargs = _cast((args, kwargs), wide)
    return op(*args, **kwargs)


def _is_castable(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in _CASTABLE


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """The tree with its tensors in this dtype."""
    casts = _CASTS.get()
    assert casts is not None

    def cast(leaf: Any) -> Any:
        return casts[1](leaf, dtype=dtype) if _is_castable(leaf) and leaf.dtype is not dtype else leaf

    return pytree.tree_map(cast, tree)
