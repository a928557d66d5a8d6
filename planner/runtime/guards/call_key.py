"""CallKey: the properties of a call that a captured graph is right for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner._compat.switches import Autocast
from planner._compat.tensors import shared_storages
from planner.graph.graph import Kind
from planner.tracer.host.fingerprint import Fingerprint, TensorKey, of_argument, tensor_key
from planner.tracer.joint import Joint


@dataclass(frozen=True, slots=True)
class CallKey:
    """What a captured graph is right for, beside Python's state (`Joint.host`).

    Attributes:
        inputs: per tensor leaf of the call, (shape, strides, dtype, device, requires_grad).
        weights: likewise per parameter and buffer, by qualified name.
        shared: per input, the first input in the same storage; empty unless the forward writes into an input.
        arguments: fingerprints of the call's other leaves; None for tensors.
        autocast: on the plan's device.
        switches: torch's global switches, by name.
        kinds: classes of the tensor leaves.
        same: per input, the first input that is the same tensor, where the forward asks or gradients of one tensor add up; -1
            where it may be any.
    """

    inputs: tuple[TensorKey, ...]
    weights: tuple[tuple[str, TensorKey], ...]
    shared: tuple[int, ...]
    arguments: tuple[Fingerprint | None, ...]
    autocast: Autocast
    switches: tuple[tuple[str, Any], ...]
    kinds: tuple[type, ...]
    same: tuple[int, ...] = ()


def call_key(tensors: Sequence[torch.Tensor], joint: Joint) -> CallKey:
    """The key of a call with these tensor leaves, in the modes that it was captured in."""
    return CallKey(
        inputs=tuple(tensor_key(tensor) for tensor in tensors),
        weights=joint.weights,
        shared=shared_storages(tensors) if any(given.mutated for given in joint.inputs if given.kind is Kind.INPUT) else (),
        arguments=tuple(of_argument(leaf) for leaf in joint.call.leaves),
        autocast=joint.autocast,
        switches=joint.switches,
        kinds=tuple(map(type, tensors)),
        same=tuple(
            first if joint.host.key.compares_identities or tensor.requires_grad else -1
            for first, tensor in zip(same_tensors(tensors), tensors, strict=True)
        ),
    )


def autocast_of(key: CallKey, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is as in `key`, and not as in the caller's own context.

    Enters nothing where autocast is off and has to be off: inside another context, the model's own autocast region would not be
    the outermost one, and its cast cache would not be cleared at its end.
    """
    is_on = key.autocast is not None
    if not is_on and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, key.autocast, enabled=is_on, cache_enabled=dict(key.switches)["autocast cache"])


def same_tensors(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Per tensor, the position of the first one that is the same."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors))


def are_same(expected: Sequence[int], tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the same tensors are the same as a key says."""
    return all(first in (-1, now) for first, now in zip(expected, same_tensors(tensors), strict=True))
