"""What kernels did when they were run: the layouts of their outputs, and whether a second run repeats the first.

A table for the whole process. The fake tensors of a trace follow it (`planner._compat.fake_tensors.fake_mode`), so that what a
trace decides by strides (a view or a copy, the formula of a backward) is decided as eager decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from planner.kernels.calls import call_key, tensors_in

TRACED = "planner_call"
"""Where a node's `meta` holds the call as it was traced, before the graph was brought into normal form."""

OWN_NAMESPACES = frozenset(
    {"aten", "prims", "quantized", "mkldnn", "mkl", "mkldnn_prepacked", "rngprims", "checkpoint_planner"}
)
"""Operators that torch, or this package, vouches for: their tags say which of them draw random numbers."""


def dtype_name(dtype: torch.dtype) -> str:
    """'float32', the name under which torch has it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Look:
    """A tensor's dtype, sizes and strides."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Look:
        """A tensor's look."""
        return cls(tensor.dtype, tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())))

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)} with strides {list(self.stride)}"


@dataclass(frozen=True, slots=True)
class Observation:
    """One kernel, as it ran.

    Attributes:
        looks: of its output tensors, in order; empty where it could not be run.
        repeatable: a second run on equal inputs, with the generator in the same state, gave the same bits and changed nothing.
        draws: it moved the device's default generator.
        writes: it wrote into an argument, which its schema does not say.
        communicates: it uses torch.distributed inside, and was not run to its end.
    """

    looks: tuple[Look, ...] = ()
    repeatable: bool = False
    draws: bool = False
    writes: bool = False
    communicates: bool = False


_SEEN: dict[str, Observation] = {}
_FOLLOWED: dict[Any, dict[str, tuple[Look, ...]]] = {}
"""Operator -> call -> the looks of its outputs, for calls whose fake outputs look otherwise."""


def remember(key: str, target: Any, observation: Observation, fakes: Sequence[torch.Tensor]) -> None:
    """Note what a call did; where its outputs look otherwise than `fakes`, traces follow them from now on."""
    _SEEN[key] = observation
    if differing(observation.looks, fakes):
        _FOLLOWED.setdefault(target, {})[key] = observation.looks


def recall(key: str) -> Observation | None:
    """What is known of a call."""
    return _SEEN.get(key)


def observation_of(node: Node) -> Observation | None:
    """What is known of the call that a node of a joint graph was traced from."""
    return _SEEN.get(node.meta.get(TRACED, ""))


def differing(looks: Sequence[Look], fakes: Sequence[torch.Tensor]) -> bool:
    """An output has another dtype or other strides than its fake.

    Sizes do not count: those of torch's own kernels may depend on the values of the inputs, which were made up.
    """
    if [look.shape for look in looks] != [tuple(fake.shape) for fake in fakes]:
        return False
    return any(look != Look.of(fake) for look, fake in zip(looks, fakes, strict=True) if fake.numel())


def as_observed(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, empty: Callable[[Look, torch.device], Any]
) -> Any:
    """The outputs of a fake call, with those replaced that really look otherwise; `empty` makes a tensor of a look."""
    followed = _FOLLOWED.get(target)
    looks = None if followed is None else followed.get(call_key(target, args, kwargs))
    if looks is None or len(looks) != len(tensors_in(out)):
        return out
    rest = iter(looks)

    def replaced(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(replaced, value))
        if not isinstance(value, torch.Tensor):
            return value
        look = next(rest)
        return value if Look.of(value) == look else empty(look, value.device)

    return replaced(out)


def needs_run(node: Node) -> bool:
    """Whether a kernel's fake outputs may look otherwise than real ones, or more than its outputs has to be known.

    That an output differs was seen for inputs that are not plainly contiguous, for inputs of several floating-point dtypes
    (the statistics of a norm in mixed precision), and for operators from outside of torch. CUDA's libraries choose layouts on
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
