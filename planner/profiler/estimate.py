"""Costs of kernels on hardware that is not here: a roofline over the shapes of the fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from planner.errors import InputError, first_line
from planner.kernels.calls import tensors_in
from planner.kernels.facts import is_random
from planner.log import PROFILER
from planner.profiler.profile import KernelCost, Profile
from planner.units import shown

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A device as a roofline.

    Attributes:
        name: for people to read; ends up in Profile.model.
        flops_per_s: attainable rate of float32 matrix products, in FLOP/s (a multiply-add is two).
        bytes_per_s: attainable memory bandwidth, in B/s.
        launch_ns: fixed cost of one kernel call, in ns.
        dtype_speed: rate of other dtypes relative to float32; a missing dtype counts as 1.
        draws_per_s: random numbers a second; on a CPU far below what memory bandwidth allows.
        tf32_speed: rate of float32 matrix products relative to `flops_per_s` where torch may round their inputs to TF32.
        capability: CUDA compute capability, which decides the kernels that torch chooses; None for what is no CUDA device.
        memory_bytes: size of its memory; 0 where unknown.
        library_bytes: what cuBLAS and the like hold there for good, from torch's allocator.
        held_bytes: of its memory, what torch cannot have: error correction, the driver, a CUDA context.
        source: where the figures come from.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    launch_ns: int
    dtype_speed: Mapping[torch.dtype, float] = field(default_factory=lambda: MappingProxyType({}))
    draws_per_s: float = math.inf
    tf32_speed: float = 1.0
    capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    library_bytes: int = 0
    source: str = ""
    held_bytes: int = 0

    def __post_init__(self) -> None:
        numbers = (self.flops_per_s, self.bytes_per_s, self.draws_per_s, self.tf32_speed, self.launch_ns, self.memory_bytes)
        if not isinstance(self.name, str) or not isinstance(self.dtype_speed, Mapping):
            raise InputError(f"a device has a name (str) and dtype_speed (a dict), got {shown(self.name)}")
        if not all(
            isinstance(n, Real) and n == n for n in (*numbers, self.library_bytes, self.held_bytes, *self.dtype_speed.values())
        ):
            raise InputError(f"device {shown(self.name)}: rates, times and sizes must be numbers, got {numbers}")
        rates = (self.flops_per_s, self.bytes_per_s, self.draws_per_s, self.tf32_speed, *self.dtype_speed.values())
        if min(rates) <= 0 or self.launch_ns < 0:
            raise InputError(f"device {shown(self.name)}: rates must be positive, launch_ns must not be negative: {numbers}")


GENERIC_CPU = DeviceModel("generic CPU", 100e9, 15e9, 5_000, MappingProxyType({torch.float64: 0.5}), 3e8)
"""A few cores with AVX2: 100 GFLOP/s, 15 GB/s, 5 us per call, 3e8 draws/s (1.4e8 in one thread, measured)."""

GENERIC_GPU = DeviceModel(
    "generic GPU", 100e12, 1.3e12, 3_000, MappingProxyType({torch.float64: 0.1, **dict.fromkeys(_HALF, 2.0)})
)
"""A data-centre GPU with TF32 matrix products: 100 TFLOP/s (200 in half precision), 1.3 TB/s, 3 us per call."""


def estimate(nodes: Sequence[Node], device: DeviceModel | None = None) -> Profile:
    """Price every node by max(FLOPs / rate, bytes / bandwidth) + launch. Runs and allocates nothing; deterministic.

    Args:
        nodes: call_function nodes with fake tensors in `meta["val"]`.
        device: the hardware; None means GENERIC_GPU if a node computes on a GPU, else GENERIC_CPU.

    Returns:
        A Profile with workspace 0 everywhere, except for convolutions: see `_workspace_bytes`.
    """
    if device is None:
        on_gpu = any(t.device.type not in ("cpu", "meta") for node in nodes for t in tensors_in(node.meta.get("val")))
        device = GENERIC_GPU if on_gpu else GENERIC_CPU
    costs = {node.name: estimate_node(node, device) for node in nodes}
    return Profile(costs, device.name, device.name)


def estimate_node(node: Node, device: DeviceModel) -> KernelCost:
    """The same for one node."""
    outputs = tensors_in(node.meta.get("val"))
    dtype = next((t.dtype for t in (*outputs, *_inputs(node)) if t.dtype.is_floating_point), torch.float32)
    compute_s = _flops(node) / (device.flops_per_s * _speed(node, dtype, device))
    memory_s = _bytes_moved(node) / device.bytes_per_s
    draw_s = sum(t.numel() for t in outputs[:1]) / device.draws_per_s if is_random(node) else 0.0
    return KernelCost(device.launch_ns + round(max(compute_s, memory_s, draw_s) * 1e9), _workspace_bytes(node))


def _speed(node: Node, dtype: torch.dtype, device: DeviceModel) -> float:
    """The rate for a dtype, relative to float32's. TF32: convolutions by default, matrix products where the user says so."""
    if dtype is not torch.float32:
        return device.dtype_speed.get(dtype, 1.0)
    convolves = _packet_name(node) in _CONVOLUTIONS
    allowed = torch.backends.cudnn.allow_tf32 if convolves else torch.get_float32_matmul_precision() != "highest"
    return device.tf32_speed if allowed else 1.0


def _inputs(node: Node) -> list[torch.Tensor]:
    return [t for arg in node.all_input_nodes for t in tensors_in(arg.meta.get("val"))]


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory that a tensor takes: a broadcast (stride 0) dimension is read from cache, not from memory."""
    sizes = [1 if stride == 0 else int(size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return math.prod(sizes) * tensor.element_size()


_CONVOLUTIONS = ("convolution", "convolution_backward")

_ROW_READERS = frozenset({"embedding", "index_select", "gather", "index", "_unsafe_index", "take", "nll_loss_forward"})
"""Kernels that read of their big argument only as much as they write."""


def _bytes_moved(node: Node) -> int:
    written = sum(_touched_bytes(t) for t in tensors_in(node.meta.get("val")))
    read = [_touched_bytes(t) for t in _inputs(node)]
    if _packet_name(node) in _ROW_READERS:
        read = [min(size, written) for size in read]
    return written + sum(read)


def _packet_name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


# Fused CPU attention is missing from torch's registry; its tensor arguments are laid out as in the others.
_CPU_FLOPS: Mapping[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, **kw: sdpa_flop_count(  # type: ignore[no-untyped-call]
        q.shape, k.shape, v.shape
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda g, q, k, v, *rest, **kw: sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
        g.shape, q.shape, k.shape, v.shape
    ),
}


def _flops(node: Node) -> int:
    """Matrix products and convolutions by torch's formulas, one FLOP per output element for everything else."""
    val = node.meta.get("val")
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta.get("val"))
    packet = getattr(node.target, "overloadpacket", node.target)
    try:
        if _packet_name(node) in _CPU_FLOPS:
            return int(_CPU_FLOPS[_packet_name(node)](*args, **kwargs))
        if packet in flop_registry:
            return int(flop_registry[packet](*args, **kwargs, out_val=val))
    except Exception as error:  # a formula that cannot read an unusual call must not stop a plan
        PROFILER.debug("the formula for the FLOPs of %s cannot read its call: %s", node.target, first_line(error))
    return sum(t.numel() for t in tensors_in(val))


def _workspace_bytes(node: Node) -> int:
    """A guess: convolutions hold a reordered copy of what they read; nothing else counts.

    Measured on CPU, 56 convolutions of a ResNet-50 and a small CNN, as a multiple of the bytes read: forward median
    1.0, backward median 0.9, quartiles 0.7 to 1.3; the largest 10.6 forward, 1.34 backward.
    """
    if _packet_name(node) in _CONVOLUTIONS:
        return sum(_touched_bytes(t) for t in _inputs(node))
    return 0


_PRODUCTS = frozenset({"addmm", "baddbmm", "bmm", "mm"})
_BLOCK = 16
"""Channels of a block of oneDNN's layouts, to which it pads."""


def most_workspace_bytes(node: Node) -> int:
    """An upper bound, by experience, of what a kernel on a CPU holds; 0 for those that hold little.

    Matrix products in half precision: what they read and write in float32. Convolutions: copies of what they read and write
    in blocked layouts, and half as much again; where a grouped one reads channels-last tensors in its backward, four unfolded
    copies of its input. Of 110 convolutions of 14 small models, none held more (float32, torch 2.13).
    """
    tensors = [*_inputs(node), *tensors_in(node.meta.get("val"))]
    if _packet_name(node) in _PRODUCTS and any(tensor.dtype in _HALF for tensor in tensors):
        return 2 * sum(_touched_bytes(t) for t in tensors)
    if _packet_name(node) not in _CONVOLUTIONS:
        return 0
    blocked = sum(_padded_bytes(t) for t in tensors)
    weight = next((t for t in reversed(_inputs(node)) if t.dim() >= 3), None)
    source = _inputs(node)[-2] if len(_inputs(node)) > 1 else None
    unfolded = 0
    if weight is not None and source is not None and not source.is_contiguous() and weight.shape[1] < source.shape[1]:
        unfolded = 4 * math.prod(weight.shape[2:]) * _touched_bytes(source)
    return blocked * 3 // 2 + unfolded


def _padded_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor whose first two dimensions, of more than one, are padded to whole blocks."""
    sizes = [-(-int(n) // _BLOCK) * _BLOCK if tensor.dim() >= 3 and i == 1 else int(n) for i, n in enumerate(tensor.shape)]
    return math.prod(sizes) * tensor.element_size()
