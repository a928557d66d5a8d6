"""Everything of an object that a later step or the training loop can see, as flat text by path, so that two can be compared."""

from __future__ import annotations

import contextvars
import enum
import functools
import gc
import itertools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support import world

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_ITERATORS = (*{type(iter(held)) for held in ([], (), {}, range(0), "", set())}, itertools.cycle, itertools.count)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_state_dict_hooks",
)
_SEEN_ELSEWHERE = frozenset({*vars(nn.Module()), "forward"})


def tensor_text(tensor: torch.Tensor, *, deep: bool = True) -> str:
    """Type, metadata and a digest of the bits of a tensor, and of its gradient."""
    kind = type(tensor)
    if "_subclasses" in kind.__module__ or kind.__module__.startswith("torch.fx") or kind.__name__ == "FunctionalTensor":
        return f"TRACED {kind.__name__}"
    if is_functional(tensor):
        return "TRACED functional tensor"
    leaf = "leaf" if tensor.is_leaf else "inner"
    text = f"{kind.__name__} {tensor.dtype} {list(tensor.shape)} {leaf} grad={tensor.requires_grad} {_bits(tensor)}"
    if deep and tensor.is_leaf and tensor.grad is not None:
        text += f" .grad {tensor_text(tensor.grad, deep=False)}"
    return text


def is_functional(tensor: torch.Tensor) -> bool:
    """A wrapper that torch's tracing makes, which reads like an ordinary tensor."""
    return torch._is_functional_tensor(tensor)


def _bits(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    plain = plain.resolve_conj().resolve_neg().contiguous()
    raw = plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return f"{hash(raw):x} {_short(plain)}"


def _short(tensor: torch.Tensor) -> str:
    flat = tensor.reshape(-1)[:3]
    return "[" + ", ".join(f"{value:.9g}" if isinstance(value, float) else str(value) for value in flat.tolist()) + ", ..]"


def state_of(root: Any, name: str, home: str, *, ids: bool = False) -> dict[str, str]:
    """Text by path of everything reachable from `root`.

    Args:
        root: a module, or any object.
        name: how its path starts.
        home: name of the Python module whose classes and functions are looked into; those of others are named only.
        ids: also tell mutable containers and tensors apart from equal ones (for one process, before and after).
    """
    return dict(_Walk(home, ids).walk(name, root))


def tensors_of(root: Any, name: str, home: str) -> dict[str, torch.Tensor]:
    """The tensors that `state_of` finds, by path."""
    walk = _Walk(home)
    for _ in walk.walk(name, root):
        pass
    return walk.tensors


def namespace_of(home: types.ModuleType) -> dict[str, str]:
    """Text by path of the globals, class attributes, closures and caches of a Python module."""
    walk, found = _Walk(home.__name__), {}
    for name, value in vars(home).items():
        known = isinstance(value, types.ModuleType) or name.startswith("__")
        imported = callable(value) and getattr(value, "__module__", "") != home.__name__
        if not known and not imported:
            found |= dict(walk.walk(f"global {name}", value))
    return found


class _Walk:
    def __init__(self, home: str, ids: bool = False) -> None:
        self._home, self._ids = home, ids
        self.tensors: dict[str, torch.Tensor] = {}
        self._seen: dict[int, str] = {}
        self._alive: list[Any] = []

    def walk(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, torch.Tensor):
            self.tensors[path] = value
            yield path, tensor_text(value) + (f" at {id(value)}" if self._ids else "")
            yield from self._mapping(path, getattr(value, "__dict__", {}))
        elif isinstance(value, (*_PLAIN, enum.Enum)):
            yield path, f"{type(value).__name__} {value!r}"
        elif type(value).__module__.startswith("planner."):
            return
        elif id(value) in self._seen:
            yield path, f"same as {self._seen[id(value)]}"
        else:
            self._seen[id(value)] = path
            self._alive.append(value)  # ids are those of live objects only
            where = f" at {id(value)}" if self._ids and isinstance(value, (list, dict, set, deque)) else ""
            length = f" of {len(value)}" if isinstance(value, (list, tuple, dict, set, deque)) else ""
            yield path, f"{type(value).__name__}{length}{where}"
            yield from self._inside(path, value)

    def _inside(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, nn.Module):
            yield from self._module(path, value)
        elif isinstance(value, (types.FunctionType, types.MethodType, type, functools.partial)) or callable(value):
            yield from self._callable(path, value)
        elif (text := _opaque_text(value)) is not None:
            yield path, text
        elif isinstance(value, contextvars.ContextVar):
            yield from self.walk(f"{path}.get()", value.get(None))
        elif isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            yield path, f"at instruction {frame.f_lasti if frame else 'end'}"
            yield from self._mapping(path, dict(frame.f_locals) if frame else {})
        elif isinstance(value, _ITERATORS):
            yield from self.walk(f"{path}.rest", value.__reduce__()[1:])
        else:
            yield from self._holder(path, value)

    def _holder(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, (set, frozenset)):
            yield path, repr(sorted(map(repr, value)))
        elif isinstance(value, (Mapping, OrderedDict)):
            keys = [repr(key)[:60] if isinstance(key, _PLAIN) else f"{type(key).__name__} {i}" for i, key in enumerate(value)]
            yield f"{path} keys", ", ".join(keys)
            yield from self._mapping(path, dict(zip(keys, value.values(), strict=True)))
        elif isinstance(value, (list, tuple, deque)):
            yield from self._mapping(path, dict(enumerate(value)))
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        yield from self._mapping(path, {**slots, **getattr(value, "__dict__", {})})

    def _mapping(self, path: str, held: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        for key, item in held.items():
            yield from self.walk(f"{path}.{key}", item)

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        yield f"{path} mode", f"{type(module).__qualname__} training={module.training}"
        for kind in _HOOKS:
            yield f"{path} {kind}", str(len(getattr(module, kind)))
        for slots in (module._parameters, module._buffers, module._modules):
            yield from self._mapping(path, slots)
        own = {name: value for name, value in sorted(vars(module).items()) if name not in _SEEN_ELSEWHERE}
        yield f"{path} names", repr([*own])
        yield from self._mapping(path, own)

    def _callable(self, path: str, value: Any) -> Iterator[tuple[str, str]]:
        yield path, f"{type(value).__name__} {getattr(value, '__qualname__', '')}"
        if isinstance(value, functools.partial):
            yield from self.walk(f"{path}.given", (value.func, value.args, value.keywords))
        elif hasattr(value, "cache_info"):
            kept = [item for item in gc.get_referents(value) if isinstance(item, torch.Tensor)]
            for i, tensor in enumerate(kept):
                if "TRACED" in (text := tensor_text(tensor)):
                    yield f"{path} cached {i}", text
        elif isinstance(value, types.MethodType):
            yield from self.walk(f"{path}.self", value.__self__)
        elif getattr(value, "__module__", "") != self._home and getattr(type(value), "__module__", "") != self._home:
            return
        elif isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            yield from self._mapping(f"{path} cell", dict(enumerate(cells)))
            yield from self.walk(f"{path} defaults", (value.__defaults__, value.__kwdefaults__, vars(value)))
        elif isinstance(value, type):
            plain = {k: v for k, v in vars(value).items() if not k.startswith("__") and k not in _slots(value)}
            yield from self._mapping(path, {k: v for k, v in plain.items() if not isinstance(v, (property, staticmethod))})
        else:
            yield from self._holder(path, value)


def _slots(kind: type) -> list[str]:
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for names in declared for name in ([names] if isinstance(names, str) else names)]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _opaque_text(value: Any) -> str | None:
    """States of generators, and arrays; None for anything else."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()[:200]}"
    if isinstance(value, np.generic):
        return repr(value)
    if isinstance(value, random.Random):
        return f"state {hash(value.getstate())}"
    if isinstance(value, torch.Generator):
        return f"state {hash(value.get_state().numpy().tobytes())}"
    if isinstance(value, np.random.Generator):
        return f"state {value.bit_generator.state}"
    if isinstance(value, np.random.RandomState):
        return world.numpy_text(value)
    return None
