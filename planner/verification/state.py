"""The state that a step leaves in a model and in the process as a flat dictionary, and comparisons of two such states."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import nn

from planner.tracer.host.restorers import same_bits

_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
"""Attributes in which nn.Module stores tensors, submodules and hooks."""
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_OPAQUE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)
_SEQUENCES = (list, tuple, deque)


@dataclass(frozen=True, slots=True)
class StateEntry:
    """Names a tensor or value that a step changes or returns.

    Attributes:
        name: its place among those of its kind, in messages.
    """

    kind: Literal["output", "gradient", "input", "input gradient", "parameter", "buffer", "attribute", "generator"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def state_of(model: nn.Module) -> dict[StateEntry, Any]:
    """Parameters, buffers and plain attributes of every module; containers and objects are flattened.

    Values are tensors (not copied), plain values, and texts that name a container's type.
    """
    return dict(_of_module("", model, {}))


def _of_module(prefix: str, model: nn.Module, seen: dict[int, int]) -> Iterator[tuple[StateEntry, Any]]:
    modules = [(f"{prefix}{path}{path and '.'}", module) for path, module in model.named_modules() if id(module) not in seen]
    for _, module in modules:
        seen[id(module)] = len(seen)
    for path, module in modules:
        yield from ((StateEntry("parameter", f"{path}{name}"), tensor) for name, tensor in module._parameters.items())
        yield from ((StateEntry("buffer", f"{path}{name}"), tensor) for name, tensor in module._buffers.items())
        for name, value in vars(module).items():
            if name not in _MACHINERY and name != "forward":
                yield from _flat(f"{path}{name}", value, seen)


def _flat(path: str, value: Any, seen: dict[int, int]) -> Iterator[tuple[StateEntry, Any]]:
    """Everything that an attribute's value holds.

    Args:
        seen: numbers of the containers met before, by id.
    """
    leaf = _as_leaf(value)
    if leaf is not None or value is None:
        yield StateEntry("attribute", path), leaf
        return
    if isinstance(value, _OPAQUE):
        return
    if id(value) in seen:
        yield StateEntry("attribute", path), f"the same object as number {seen[id(value)]}"
        return
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (*_SEQUENCES, set, frozenset, Mapping)):
        seen[id(value)] = len(seen)
        yield StateEntry("attribute", path), f"{kind} of {len(value)}"
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from _flat(f"{path}[{_named(key)}]", item, seen)
        elif isinstance(value, _SEQUENCES):
            for i, item in enumerate(value):
                yield from _flat(f"{path}[{i}]", item, seen)
        else:
            yield StateEntry("attribute", f"{path}{{}}"), sorted(map(_named, value))
    elif isinstance(value, nn.Module):
        yield from _of_module(f"{path}.", value, seen)
    elif kind.startswith(("torch.", "collections.", "threading.", "_thread.")):
        return
    else:
        seen[id(value)] = len(seen)
        yield StateEntry("attribute", path), kind
        for name, item in _fields(value):
            yield from _flat(f"{path}.{name}", item, seen)


def _as_leaf(value: Any) -> Any:
    """The value to compare, for values that are compared as a whole; None for values that have to be flattened."""
    if isinstance(value, (torch.Tensor, *_SCALARS)):
        return value
    if type(value) in (list, tuple) and len(value) > 0 and all(type(item) in _SCALARS for item in value):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, itertools.count):
        return repr(value)
    if hasattr(type(value), "__next__") and hasattr(type(value), "__length_hint__"):
        return f"an iterator with {value.__length_hint__()} left"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return (str(value.dtype), value.shape, value.tobytes() if value.dtype != object else repr(value))
    if numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        bits = value.bit_generator.state if isinstance(value, numpy.random.Generator) else value.get_state(legacy=False)
        return repr(_plain_numpy(bits))
    return None


def _plain_numpy(state: Any) -> Any:
    """A bit generator's state with arrays as bytes, because the repr of an array omits entries."""
    if isinstance(state, Mapping):
        return {name: _plain_numpy(item) for name, item in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state


def _named(key: Any) -> str:
    return repr(key)[:60] if isinstance(key, (*_SCALARS, tuple)) else type(key).__qualname__


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def generators() -> dict[str, Any]:
    """States of the process's random generators, by name."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
    return states


def set_generators(states: Mapping[str, Any]) -> None:
    """Restore the states that `generators` returned."""
    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        elif name == "numpy":
            sys.modules["numpy"].random.set_state(state)
        else:
            torch.cuda.set_rng_state(state, name)


def generators_as_leaves(states: Mapping[str, Any]) -> dict[StateEntry, Any]:
    """The states that `generators` returned, in a form that `same` compares."""
    return {StateEntry("generator", name): repr(_plain_numpy(s)) if isinstance(s, dict) else s for name, s in states.items()}


def same(expected: Any, found: Any) -> bool:
    """Whether tensors are bit-equal (dtype, shape, bytes including NaNs, requires_grad), or values of one type are equal."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        if _metadata(expected) != _metadata(found):
            return False
        return same_bits(expected, found)
    if type(expected) is not type(found):
        return False
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(found)
    return bool(expected == found)


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad


def strides_that_matter(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of the dimensions with more than one entry; empty for a tensor without elements."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def largest_difference(expected: Mapping[StateEntry, Any], found: Mapping[StateEntry, Any]) -> float:
    """See `VerifyReport`."""
    off, scale = dict[str, float](), dict[str, float]()
    for leaf, one in expected.items():
        other, kind = found.get(leaf), leaf.kind
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape and one.numel():
            wide = one.detach().to(torch.complex128)  # exact for every dtype
            gap = float((wide - other.detach().to(torch.complex128)).abs().max())
            off[kind] = max(off.get(kind, 0.0), math.inf if math.isnan(gap) else gap)
            scale[kind] = max(scale.get(kind, 0.0), float(wide.abs().max()))
        elif not same(one, other):
            return math.inf
    return max((gap / scale[kind] if scale[kind] else math.inf for kind, gap in off.items() if gap), default=0.0)
