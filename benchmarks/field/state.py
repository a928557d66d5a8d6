"""Everything that a training step leaves behind, by name, in a form that can be compared bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

_NAMED = (nn.Module, type, ModuleType, RemovableHandle, fx.Graph)  # not looked into: the last two hold serial numbers
MOST_DEPTH, MOST_ENTRIES = 6, 50_000

_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and plain attributes of a module and all below it."""
    found: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in part._parameters.items():
            found |= flat(f"parameter {dot}{name}", parameter)
        for name, buffer in part._buffers.items():
            found |= flat(f"buffer {dot}{name}", buffer)
        for name, held in vars(part).items():
            if name not in _MODULE_FIELDS and name != "forward":
                found |= flat(f"attribute {dot}{name}", held)
    return found


def gradients(module: nn.Module) -> dict[str, Any]:
    """Gradients of all parameters."""
    return {f"gradient {name}": _kept(p.grad) for name, p in module.named_parameters(remove_duplicate=False)}


def generators() -> dict[str, Any]:
    """The states of the process's generators."""
    return {
        "torch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
        "numpy's generator": repr(np.random.get_state(legacy=False)),
    }


def flat(name: str, held: Any) -> dict[str, Any]:
    """Tensors, numbers and texts that can be reached from a value, by path; copies."""
    found: dict[str, Any] = {}
    for path, leaf in _walk(name, held, 0, set()):
        found[path] = leaf
        if len(found) >= MOST_ENTRIES:
            break
    return found


def _walk(path: str, held: Any, depth: int, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(held, torch.Tensor):
        yield path, _kept(held)
    elif isinstance(held, _PLAIN):
        yield path, held
    elif isinstance(held, np.ndarray | np.generic):
        yield path, (str(held.dtype), held.shape, held.tobytes() if held.dtype != object else repr(held))
    elif isinstance(held, torch.Generator):
        yield path, held.get_state()
    elif isinstance(held, np.random.Generator):
        yield path, repr(held.bit_generator.state)
    elif isinstance(held, random.Random):
        yield path, held.getstate()
    elif depth >= MOST_DEPTH or id(held) in above or isinstance(held, _NAMED):
        yield path, f"a {type(held).__name__}"
    else:
        yield path, f"a {type(held).__name__}"
        for key, inner in _items(held):
            yield from _walk(f"{path}{key}", inner, depth + 1, above | {id(held)})


def _items(held: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object holds."""
    if isinstance(held, Mapping):
        items = list(held.items())
        yield "(len)", len(items)
        yield from ((f"[{key!r:.80}]", inner) for key, inner in items)
    elif isinstance(held, set | frozenset):
        yield "(sorted)", sorted(repr(inner) for inner in held if isinstance(inner, _PLAIN))
    elif isinstance(held, list | tuple) or type(held).__name__ == "deque":
        entries = list(iter(held))  # e3nn's irreps are tuples that refuse len()
        yield "(len)", len(entries)
        yield from ((f"[{i}]", inner) for i, inner in enumerate(entries))
    if not callable(held):
        yield from ((f".{key}", inner) for key, inner in list(getattr(held, "__dict__", {}).items()))


def _kept(tensor: Any) -> Any:
    """A copy of a tensor; a name for one that holds no data."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if isinstance(tensor, FakeTensor) or type(tensor).__name__ == "FunctionalTensor" or torch._is_functional_tensor(tensor):
        return "a tensor of a trace"
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same bit for bit, or is there on one side only, in order; with how it differs."""
    off = []
    for name, one in expected.items():
        if name not in found:
            off.append(f"{name} (missing)")
        elif not same(one, found[name]):
            off.append(f"{name} ({_how(one, found[name])})")
    return off + [f"{name} (not in eager)" for name in found if name not in expected]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaNs included."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and repr(a) == repr(b)  # which tells -0.0 from 0.0, and calls NaN the same
    if (a.dtype, a.shape, a.layout, a.requires_grad) != (b.dtype, b.shape, b.layout, b.requires_grad):
        return False
    if a.layout is not torch.strided:
        a, b = (t.detach().to_sparse_coo().coalesce() for t in (a, b))
        return same(a.indices(), b.indices()) and same(a.values(), b.values())
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().view(-1).view(torch.uint8)


def _how(a: Any, b: Any) -> str:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return f"{a!r:.60} in eager, {b!r:.60}" if not isinstance(a, torch.Tensor) else f"a tensor in eager, {b!r:.60}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} in eager, {b.dtype} {tuple(b.shape)}"
    if a.requires_grad != b.requires_grad:
        return f"requires_grad {a.requires_grad} in eager"
    wide = [t.detach().to_dense().to(torch.complex128) for t in (a, b)]
    return f"by {float((wide[0] - wide[1]).abs().max()):.1e} of {float(wide[0].abs().max()):.1e}"
