"""What a plan was made for, and whether a call is that: everything capture held fixed is compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._torch import pytree
from planner.runtime.watch import Attributes, Watched, attributes
from planner.tracer.joint import CallSpec

Autocast = tuple[bool, str]
TensorKey = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]


@dataclass(frozen=True, slots=True)
class CallKey:
    """What the captured graph is right for.

    Attributes:
        inputs: per tensor leaf of the call (shape, strides, dtype, device, requires_grad).
        weights: likewise per parameter and buffer, by qualified name, strides left out.
        attributes: training flags and other plain attributes of the submodules.
        autocast: (enabled, dtype) on the plan's device.
    """

    inputs: tuple[TensorKey, ...]
    weights: tuple[tuple[str, TensorKey], ...]
    attributes: tuple[Attributes, ...]
    autocast: Autocast


_NO_AUTOCAST: Autocast = (False, "")
_INPUT = "input "


def tensor_key(tensor: torch.Tensor, *, strides: bool = True) -> TensorKey:
    """What a kernel's choice depends on."""
    return (tensor.shape, tensor.stride() if strides else (), tensor.dtype, tensor.device, tensor.requires_grad)


def autocast_key(device: torch.device) -> Autocast:
    """Whether autocast is on for this device, and to which dtype."""
    enabled = torch.is_autocast_enabled(device.type)
    return (True, str(torch.get_autocast_dtype(device.type))) if enabled else _NO_AUTOCAST


def call_key(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    volatile: Collection[tuple[int, str]] = (),
    parts: Collection[str] = (),
) -> CallKey:
    """The key of a call of `model` on these tensor leaves, now. `volatile`, `parts`: see `watch.attributes`."""
    weights = (*model.named_parameters(), *model.named_buffers())
    return CallKey(
        inputs=tuple(tensor_key(tensor) for tensor in tensors),
        weights=tuple((name, tensor_key(tensor, strides=False)) for name, tensor in weights),
        attributes=attributes(model, volatile, parts),
        autocast=autocast_key(device),
    )


def flatten_call(call: CallSpec, args: Any, kwargs: Any) -> tuple[list[Any] | None, str]:
    """Tensor leaves of a call, or None and what differs from the planned call. Keywords may come in any order."""
    keywords = tuple(kwargs)
    if keywords != call.keywords and sorted(keywords) == sorted(call.keywords):
        kwargs, keywords = {name: kwargs[name] for name in call.keywords}, call.keywords
    if call.is_flat and keywords == call.keywords and len(args) + len(keywords) == len(call.leaves):
        leaves = [*args, *kwargs.values()]
    else:
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
    key: CallKey, watched: Watched, held: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], device: torch.device
) -> str:
    """Name of the first part of the key that does not hold for a call; '' if all do."""
    if not torch.is_grad_enabled():
        return "grad mode (disabled)"
    changed = watched.changed()
    if changed:
        return changed
    for i, (tensor, expected) in enumerate(zip(tensors, key.inputs, strict=True)):
        if tensor_key(tensor) != expected:
            return f"{_INPUT}{i} ({_described(tensor)}, planned for {_expected(expected)})"
    if not watched.alike(held):
        for (name, expected), tensor in zip(key.weights, held, strict=True):
            if tensor_key(tensor, strides=False) != expected:
                return f"{name} ({_described(tensor)}, planned for {_expected(expected)})"
        watched.approve(held)
    untied = watched.untied(held)
    if untied:
        return f"{untied} (no longer the same tensor as the one it was tied to)"
    if autocast_key(device) != key.autocast:
        return f"autocast ({autocast_key(device)}, planned for {key.autocast})"
    return ""


def is_about_inputs(miss: str) -> bool:
    """What `difference` named is an input's metadata."""
    return miss.startswith(_INPUT)


def _described(tensor: torch.Tensor) -> str:
    return _expected(tensor_key(tensor))


def _expected(key: TensorKey) -> str:
    shape, strides, dtype, device, requires_grad = key
    grad = ", requires_grad" if requires_grad else ""
    layout = f" strides {strides}" if strides else ""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}{layout} on {device}{grad}"
