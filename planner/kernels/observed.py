"""What kernels did when they were run: the layouts of their outputs, and whether a second run repeats the first.

One table for the process. The fake tensors of a trace follow it (`planner._compat.fake_tensors.fake_mode`), so that what a
trace decides by strides (a view or a copy, the formula of a backward) is decided as eager decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from planner.kernels.calls import call_key, like, tensors_in

TRACED = "planner_call"
"""Key of the `call_key` of the call that a node was traced from, in its `meta`: passes change the node's arguments.

The one entry of this package's in `meta` after a capture: profiler and rewriter ask about nodes without their graph."""

OWN_NAMESPACES = frozenset(
    {"aten", "prims", "quantized", "mkldnn", "mkl", "mkldnn_prepacked", "rngprims", "checkpoint_planner"}
)
"""Operators of torch and of this package, whose tags and schemas are right."""


def dtype_name(dtype: torch.dtype) -> str:
    """'float32', the name under which torch has it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor's dtype, sizes and strides."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorLayout:
        """A tensor's layout."""
        return cls(tensor.dtype, tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())))

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)} with strides {list(self.stride)}"


@dataclass(frozen=True, slots=True)
class ObservedKernel:
    """What one kernel did when it was run.

    Attributes:
        layouts: of its output tensors, in order; empty where it could not be run.
        repeatable: a second run on equal inputs, with the generator in the same state, gave the same bits and changed nothing.
        draws: it moved the device's default generator.
        writes: it wrote into an argument, which its schema does not say.
        communicates: it uses torch.distributed inside, and was not run to its end.
    """

    layouts: tuple[TensorLayout, ...] = ()
    repeatable: bool = False
    draws: bool = False
    writes: bool = False
    communicates: bool = False


_SEEN: dict[str, ObservedKernel] = {}
_FOLLOWED: dict[Any, dict[str, tuple[TensorLayout, ...]]] = {}
"""Operator -> call -> the layouts of its outputs, for calls whose fake outputs have other layouts."""


def remember(key: str, target: Any, observation: ObservedKernel, fakes: Sequence[torch.Tensor]) -> None:
    """Note what a call did; where its outputs have other layouts than `fakes`, traces use the real ones from now on."""
    _SEEN[key] = observation
    if differing(observation.layouts, fakes):
        _FOLLOWED.setdefault(target, {})[key] = observation.layouts


def recall(key: str) -> ObservedKernel | None:
    """What is known of a call."""
    return _SEEN.get(key)


def observation_of(node: Node) -> ObservedKernel | None:
    """What is known of the call that a node of a joint graph was traced from."""
    return _SEEN.get(node.meta.get(TRACED, ""))


def differing(layouts: Sequence[TensorLayout], fakes: Sequence[torch.Tensor]) -> bool:
    """An output has another dtype or other strides than its fake.

    Sizes do not count: those of torch's own kernels may depend on the values of the inputs, which were made up.
    """
    if [layout.shape for layout in layouts] != [tuple(fake.shape) for fake in fakes]:
        return False
    return any(layout != TensorLayout.of(fake) for layout, fake in zip(layouts, fakes, strict=True) if fake.numel())


def as_observed(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, empty: Callable[[TensorLayout, torch.device], Any]
) -> Any:
    """The outputs of a fake call, with those replaced whose real layouts differ; `empty` makes a tensor of a layout."""
    followed = _FOLLOWED.get(target)
    layouts = None if followed is None else followed.get(call_key(target, args, kwargs))
    if layouts is None or len(layouts) != len(tensors_in(out)):
        return out
    rest = iter(layouts)

    def replaced(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return like(value, map(replaced, value))
        if not isinstance(value, torch.Tensor):
            return value
        layout = next(rest)
        return value if TensorLayout.of(value) == layout else empty(layout, value.device)

    return replaced(out)


def needs_run(node: Node) -> bool:
    """Whether a kernel's fake outputs may have other layouts than real ones, or more than its outputs has to be known.

    Outputs were found to differ for inputs that are not contiguous, for inputs of several floating-point dtypes
    (the statistics of a norm in mixed precision), and for operators that are not torch's. CUDA's libraries choose layouts on
    their own.
    """
    if is_foreign(node.target):
        return True
    tensors = [t for arg in node.all_input_nodes for t in tensors_in(arg.meta.get("val"))]
    is_mixed = len({tensor.dtype for tensor in tensors if tensor.is_floating_point()}) > 1
    return is_mixed or any(not _is_plain(tensor) or tensor.device.type == "cuda" for tensor in tensors)


def is_foreign(target: Any) -> bool:
    """An operator that some library or the user defined."""
    return getattr(target, "namespace", "aten") not in OWN_NAMESPACES


def _is_plain(tensor: torch.Tensor) -> bool:
    """The strides are those of `torch.empty(shape)`, of dimensions of size 1 too."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(int(size), 1)
    return True
