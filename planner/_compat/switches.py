"""Torch's global switches, some of which have no public name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from planner._compat.private_names import MODULE_HOOKS

Autocast = torch.dtype | None
"""The dtype that autocast casts to on a device; None where it is off."""


def autocast_key(device: torch.device) -> Autocast:
    """The dtype that autocast casts to on this device now."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def global_switches() -> tuple[tuple[str, Any], ...]:
    """Torch's switches that decide which kernels run or what a call means, as (name, state) pairs.

    They compare equal for equal states.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    einsum = torch.backends.opt_einsum
    return (
        ("deterministic algorithms", torch.get_deterministic_debug_mode()),
        ("fill_uninitialized_memory", getattr(torch.utils.deterministic, "fill_uninitialized_memory", None)),
        ("sdpa: flash", cuda.flash_sdp_enabled()),
        ("sdpa: memory-efficient", cuda.mem_efficient_sdp_enabled()),
        ("sdpa: math", cuda.math_sdp_enabled()),
        ("sdpa: cudnn", cuda.cudnn_sdp_enabled()),
        ("sdpa: math in low precision", cuda.fp16_bf16_reduction_math_sdp_allowed()),
        ("sdpa: order of kernels", tuple(map(int, torch._C._get_sdp_priority_order()))),
        ("float32 matmul precision", _legacy(torch.get_float32_matmul_precision)),
        ("cuda tf32", _legacy(lambda: cuda.matmul.allow_tf32)),
        ("cuda fp16 reduction", cuda.matmul.allow_fp16_reduced_precision_reduction),
        ("cuda bf16 reduction", cuda.matmul.allow_bf16_reduced_precision_reduction),
        ("cudnn", (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, _legacy(lambda: cudnn.allow_tf32))),
        ("mkldnn", torch._C._get_mkldnn_enabled()),
        ("mkldnn deterministic", getattr(mkldnn, "deterministic", None)),
        ("opt_einsum", (einsum.enabled, einsum.strategy) if einsum.is_available() else None),
        ("default dtype", torch.get_default_dtype()),
        ("default device", str(torch.get_default_device())),
        ("autocast cache", torch.is_autocast_cache_enabled()),
        ("inference mode", torch.is_inference_mode_enabled()),
        ("forward-mode AD", torch.autograd.forward_ad._current_level),
        ("torch.func transforms", _transform_level()),
        ("function modes", torch._C._len_torch_function_stack() - _device_modes()),
        ("dispatch modes", torch._C._len_torch_dispatch_stack()),
        ("global module hooks", _num_global_hooks()),
        ("tracing", torch.jit.is_tracing() or torch.compiler.is_exporting()),
        ("tracing by fx", getattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", False)),
    )


def _transform_level() -> int:
    """How many transforms of torch.func (vmap, grad, jvp) the code that runs now is in."""
    return torch._C._functorch.maybe_current_level() or 0


def in_transform() -> bool:
    """The code that runs now is in a transform of torch.func, or differentiated in forward mode."""
    return _transform_level() > 0 or torch.autograd.forward_ad._current_level >= 0


def saved_tensors_hooks() -> tuple[bool, Any]:
    """(whether hooks on saved tensors are allowed, those that would pack a tensor now; None if there are none)."""
    is_allowed = bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]
    return is_allowed, torch._C._autograd._top_saved_tensors_default_hooks(True) if is_allowed else None


_SETTABLE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *((partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)) for device in ("cpu", "cuda")),
)
"""(how it stands, how to set it) of the switches that forwards set for a part of their code."""


_OF_A_FORWARD: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
)
"""(how it stands, how to set it) of the switches by which code chooses kernels: a forward alone may run under others."""


def forward_switches() -> tuple[Any, ...]:
    """How these stand now; can be compared and pickled."""
    return tuple(get() for get, _ in _OF_A_FORWARD)


@contextlib.contextmanager
def switches_as(planned: tuple[Any, ...]) -> Iterator[None]:
    """While entered, they stand as `forward_switches` found them; () leaves them."""
    found = forward_switches()
    changed = [(put, now, then) for (_, put), now, then in zip(_OF_A_FORWARD, found, planned, strict=False) if now != then]
    for put, _, then in changed:
        put(then)
    try:
        yield
    finally:
        for put, now, _ in changed:
            put(now)


_OF_KERNELS = frozenset(
    (
        *("deterministic algorithms", "float32 matmul precision", "cuda tf32", "cuda fp16 reduction", "cuda bf16 reduction"),
        *("cudnn", "mkldnn", "mkldnn deterministic"),
    )
)


def kernel_switches() -> dict[str, Any]:
    """Of `global_switches`, those by which the same kernel computes other bits."""
    return {name: state for name, state in global_switches() if name in _OF_KERNELS}


@contextlib.contextmanager
def switches_preserved(*, after_success: bool = True) -> Iterator[None]:
    """At exit, put back what code left in another state; `after_success` False: only where it raised."""
    before = [(get, put, _legacy(get)) for get, put in _SETTABLE]
    puts_back = True
    try:
        yield
        puts_back = after_success
    finally:
        for get, put, state in before if puts_back else ():
            if _legacy(get) != state:
                put(state)


_FP32 = (
    ("generic", "all"),
    *((backend, kernels) for backend in ("cuda", "mkldnn") for kernels in ("all", "matmul", "conv", "rnn")),
)
"""What has a float32 precision of its own (`torch.backends.cuda.matmul.fp32_precision`)."""


def _legacy(switch: Callable[[], Any]) -> Any:
    """A switch of float32's precision. Torch raises where those of the newer names say more: all of these."""
    try:
        return switch()
    except RuntimeError:
        return tuple(torch._C._get_fp32_precision_getter(*pair) for pair in _FP32)


def _device_modes() -> int:
    """Number of active device contexts: a default device is a function mode, and is compared as `default device`."""
    return sum(type(mode).__name__ == "DeviceContext" for mode in torch.overrides._get_current_function_mode_stack())


_GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{kind}") for kind in MODULE_HOOKS)


def has_global_hooks() -> bool:
    """There are hooks of all modules."""
    return any(_GLOBAL_HOOKS) and _num_global_hooks() > 0


def _num_global_hooks() -> int:
    hooks = [hook for held in _GLOBAL_HOOKS for hook in held.values()]
    return sum(not str(getattr(hook, "__module__", "")).startswith("planner.") for hook in hooks)  # another thread may capture
