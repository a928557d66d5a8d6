"""Which submodules may be units, and what two of them must have in common before their kernels are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner.kernels.observed import dtype_name

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    torch.memory_format,
)
"""Types of values that are compared by value."""
_FEWEST = 2
"""Submodules of one class in one container, to try."""
_FEWEST_WEIGHTS = 3
"""Parameters in a unit: a lone linear layer is traced faster than it is copied."""


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's dtype, device, sizes and strides."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """A tensor's form."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)} with strides {list(self.stride)}"

    def empty(self) -> torch.Tensor:
        """A tensor of this form in a storage of its own."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def candidates(model: nn.Module, apart: Collection[str]) -> dict[nn.Module, str]:
    """Submodules that may be units, by name: those of one class in one container, none inside of another one.

    Args:
        apart: submodules that no unit may be or contain: opaque ones and all in them, and those with Python state.
    """
    found: dict[nn.Module, str] = {}
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or any(is_inside(name, other) for other in found.values()):
            continue
        children = [(f"{name}.{key}".lstrip("."), child) for key, child in container.named_children()]
        counts = Counter(type(child) for _, child in children)
        for place, child in children:
            if counts[type(child)] >= _FEWEST and sum(1 for _ in child.parameters()) >= _FEWEST_WEIGHTS:
                found[child] = place
    tied = _tied(model, found)
    return {
        module: name
        for module, name in found.items()
        if name not in tied and not any(is_inside(other, name) for other in apart)
    }


def is_inside(name: str, other: str) -> bool:
    """The submodule `name` is `other`, or one of its submodules."""
    return name == other or name.startswith(f"{other}.")


def _tied(model: nn.Module, units: dict[nn.Module, str]) -> set[str]:
    """Units that share a parameter with another part of the model: its gradient is a sum over both."""
    everywhere = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = set()
    for module, name in units.items():
        inside = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        if any(everywhere[one] != count for one, count in inside.items()):
            found.add(name)
    return found


def structure(module: nn.Module) -> Hashable | None:
    """Classes, weights and buffers of a module, equal for two that may be of one kind; None where it has hooks."""
    parts = []
    for name, part in module.named_modules(remove_duplicate=False):
        if any(vars(part)[kind] for kind in MODULE_HOOKS):
            return None
        own_forward = id(vars(part)["forward"]) if "forward" in vars(part) else 0
        parts.append((name, type(part), part.training, own_forward))
    weights = list(module.named_parameters(remove_duplicate=False))
    first: dict[int, int] = {}
    ties = tuple(first.setdefault(id(weight), i) for i, (_, weight) in enumerate(weights))
    buffers = module.named_buffers(remove_duplicate=False)
    return (
        tuple(parts),
        tuple((name, Form.of(weight), weight.requires_grad) for name, weight in weights),
        ties,
        tuple((name, Form.of(buffer)) for name, buffer in buffers),
    )


def is_plain(value: Any) -> bool:
    """The value is compared by value."""
    return isinstance(value, PLAIN)


def changeable(value: Any) -> str:
    """The type of what is neither a tensor nor a plain value nor a tuple of such: a list, say; '' if there is nothing else.

    A unit is called with a copy of its arguments' tree, and a copy of its output's is returned: who writes into a container,
    or asks whether it is the same one, would find another than in the whole model.
    """
    if isinstance(value, tuple) and not getattr(value, "__dict__", None):
        return next(filter(None, map(changeable, value)), "")
    return "" if isinstance(value, torch.Tensor) or is_plain(value) else type(value).__name__
