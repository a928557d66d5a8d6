"""What a plan was made for, and whether a call is that: everything capture held fixed is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._torch import pytree
from planner.tracer.joint import CallSpec

Autocast = tuple[bool, str]
TensorKey = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]


@dataclass(frozen=True, slots=True)
class CallKey:
    """What the captured graph is right for.

    Attributes:
        inputs: per tensor leaf of the call (shape, strides, dtype, device, requires_grad).
        weights: likewise per parameter and buffer, by qualified name, strides left out.
        training: the training flag of every submodule, in `modules()` order.
        autocast: (enabled, dtype) on the plan's device.
    """

    inputs: tuple[TensorKey, ...]
    weights: tuple[tuple[str, TensorKey], ...]
    training: tuple[bool, ...]
    autocast: Autocast


def tensor_key(tensor: torch.Tensor, *, strides: bool = True) -> TensorKey:
    """What a kernel's choice depends on."""
    return (tensor.shape, tensor.stride() if strides else (), tensor.dtype, tensor.device, tensor.requires_grad)


def autocast_key(device: torch.device) -> Autocast:
    """Whether autocast is on for this device, and to which dtype."""
    enabled = torch.is_autocast_enabled(device.type)
    return enabled, str(torch.get_autocast_dtype(device.type)) if enabled else ""


def call_key(model: nn.Module, tensors: Sequence[torch.Tensor], device: torch.device) -> CallKey:
    """The key of a call of `model` on these tensor leaves, now."""
    weights = (*model.named_parameters(), *model.named_buffers())
    return CallKey(
        inputs=tuple(tensor_key(tensor) for tensor in tensors),
        weights=tuple((name, tensor_key(tensor, strides=False)) for name, tensor in weights),
        training=tuple(module.training for module in model.modules()),
        autocast=autocast_key(device),
    )


class Weights:
    """A model's parameters and buffers by name, looked up anew at every call through the modules that hold them."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.modules = tuple(model.modules())
        self._places = [_place(model, name) for name in names]
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(self.now())))}
        every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        known = set(names)
        self._ties = [(name, _place(model, name), first[id(tensor)]) for name, tensor in every if name not in known]

    def untied(self, held: Sequence[torch.Tensor]) -> str:
        """Name of a tensor that was the same as another when this was made and no longer is; '' if none."""
        return next((name for name, (holder, key), i in self._ties if holder[key] is not held[i]), "")

    def now(self) -> list[torch.Tensor]:
        """The tensors that the model holds at this moment."""
        return [holder[name] for holder, name in self._places]


def _place(model: nn.Module, qualified: str) -> tuple[dict[str, Any], str]:
    path, _, name = qualified.rpartition(".")
    module = model.get_submodule(path)
    holder = module._parameters if name in module._parameters else module._buffers
    return holder, name


def flatten_call(call: CallSpec, args: Any, kwargs: Any) -> tuple[list[Any] | None, str]:
    """Tensor leaves of a call, or None and what differs from the planned call."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != call.in_spec:
        return None, "the structure of the arguments"
    for i, expected in enumerate(call.leaves):
        leaf = leaves[i]
        if i in call.tensors:
            if not isinstance(leaf, torch.Tensor):
                return None, f"argument leaf {i} (a {type(leaf).__name__}, planned for a tensor)"
        elif isinstance(leaf, torch.Tensor) or leaf != expected:
            return None, f"argument leaf {i} ({leaf!r}, planned for {expected!r})"
    return [leaves[i] for i in call.tensors], ""


def difference(
    key: CallKey, weights: Weights, held: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], device: torch.device
) -> str:
    """Name of the first part of the key that does not hold for a call; '' if all do."""
    if not torch.is_grad_enabled():
        return "grad mode (disabled)"
    for module, training in zip(weights.modules, key.training, strict=True):
        if module.training != training:
            return f"training mode (a {type(module).__name__} is in {'training' if module.training else 'eval'} mode)"
    for i, (tensor, expected) in enumerate(zip(tensors, key.inputs, strict=True)):
        if tensor_key(tensor) != expected:
            return f"input {i} ({_described(tensor)}, planned for {_expected(expected)})"
    for (name, expected), tensor in zip(key.weights, held, strict=True):
        shape, _, dtype, where, requires_grad = expected
        if tensor.requires_grad != requires_grad or tensor.dtype != dtype or tensor.device != where or tensor.shape != shape:
            return f"{name} ({_described(tensor)}, planned for {_expected(expected)})"
    untied = weights.untied(held)
    if untied:
        return f"{untied} (no longer the same tensor as the one it was tied to)"
    if autocast_key(device) != key.autocast:
        return f"autocast ({autocast_key(device)}, planned for {key.autocast})"
    return ""


def _described(tensor: torch.Tensor) -> str:
    return _expected(tensor_key(tensor))


def _expected(key: TensorKey) -> str:
    shape, strides, dtype, device, requires_grad = key
    grad = ", requires_grad" if requires_grad else ""
    layout = f" strides {strides}" if strides else ""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}{layout} on {device}{grad}"
