"""What a plan was made for, and whether a call is that: everything that capture held fixed is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner._compat.internals import pytree, storage_id
from planner._compat.switches import global_switches
from planner.graph.graph import Kind
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.guards.model_state import Watched
from planner.tracer.call import CallSpec
from planner.tracer.host.fingerprint import (
    Fingerprint,
    Fingerprints,
    TensorKey,
    alike,
    describe_tensor,
    first_difference,
    tensor_key,
)
from planner.tracer.joint import Joint

Autocast = torch.dtype | None
"""The dtype that autocast casts to on a device; None where it is off."""


@dataclass(frozen=True, slots=True)
class CallKey:
    """What the captured graph is right for, beside Python's state (`Joint.host`).

    Attributes:
        inputs: per tensor leaf of the call (shape, strides, dtype, device, requires_grad).
        weights: likewise per parameter and buffer, by qualified name.
        shared: per input, the first one that lies in the same storage; only where the forward writes into one.
        arguments: fingerprints of the call's other leaves; None where a tensor stands.
        autocast: on the plan's device.
        switches: torch's global switches, by name.
    """

    inputs: tuple[TensorKey, ...]
    weights: tuple[tuple[str, TensorKey], ...]
    shared: tuple[int, ...]
    arguments: tuple[Fingerprint | None, ...]
    autocast: Autocast
    switches: tuple[tuple[str, Any], ...]


_EVERYTHING = Fingerprints({}, lambda _, name: True)


def autocast_key(device: torch.device) -> Autocast:
    """What autocast casts to on this device now."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _autocast_text(autocast: Autocast) -> str:
    return "off" if autocast is None else f"to {str(autocast).removeprefix('torch.')}"


def autocast_of(key: CallKey, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a key; the caller's own context has no influence.

    Enters nothing where autocast is off and must be off: inside a context entered here, the model's own autocast region would
    not be the outermost one, and its cast cache would not be cleared when it ends.
    """
    is_on = key.autocast is not None
    if not is_on and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, key.autocast, enabled=is_on, cache_enabled=dict(key.switches)["autocast cache"])


def call_key(tensors: Sequence[torch.Tensor], joint: Joint) -> CallKey:
    """The key of a call on these tensor leaves, in the modes that are on now."""
    return CallKey(
        inputs=tuple(tensor_key(tensor) for tensor in tensors),
        weights=joint.weights,
        shared=shared_storages(tensors) if any(given.mutated for given in joint.inputs if given.kind is Kind.INPUT) else (),
        arguments=tuple(argument_print(leaf) for leaf in joint.call.leaves),
        autocast=autocast_key(joint.device),
        switches=global_switches(),
    )


def argument_print(leaf: Any) -> Fingerprint:
    """The fingerprint of a leaf of a call that is no tensor; everything in it counts."""
    return _EVERYTHING.of(leaf)


def shared_storages(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Per tensor, the position of the first one that lies in the same storage."""
    first: dict[int, int] = {}
    storages = [storage_id(tensor) if tensor.layout is torch.strided else -1 - i for i, tensor in enumerate(tensors)]
    return tuple(first.setdefault(storage, i) for i, storage in enumerate(storages))


def flatten_call(call: CallSpec, args: Any, kwargs: Any, prints: Sequence[Fingerprint]) -> tuple[list[Any], Mismatch | None]:
    """Tensor leaves of a call, or what differs from the planned call. Keywords may come in any order."""
    keywords = tuple(kwargs)
    if keywords != call.keywords and sorted(keywords) == sorted(call.keywords):
        kwargs, keywords = {name: kwargs[name] for name in call.keywords}, call.keywords
    if call.is_flat and keywords == call.keywords and len(args) + len(keywords) == len(call.leaves):
        leaves = [*args, *kwargs.values()]
    else:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != call.in_spec:
            return [], Mismatch("argument", "the structure of the arguments")
    for i in range(len(call.leaves)):
        leaf = leaves[i]
        if i in call.tensors:
            if not isinstance(leaf, torch.Tensor):
                return [], Mismatch("argument", f"argument leaf {i}", f"a {type(leaf).__name__}", "a tensor")
        elif not _is_plain_equal(leaf, call.leaves[i]):
            now = argument_print(leaf)
            if not alike(prints[i], now):
                found = first_difference(prints[i], now, f"argument leaf {i}")
                return [], Mismatch("argument", found.where, found.now, found.planned)
    return [leaves[i] for i in call.tensors], None


def _is_plain_equal(leaf: Any, expected: Any) -> bool:
    """Quickly: certainly the same."""
    return leaf is expected and (leaf is None or type(leaf) in (bool, int, str, float))


def difference(
    key: CallKey,
    watched: Watched,
    held: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    *,
    through_forward: bool = False,
) -> Mismatch | None:
    """The first part of the key that does not hold for a call; `through_forward`: see `HostGuard.difference`."""
    if not torch.is_grad_enabled():
        return Mismatch("mode", "grad mode", "disabled")
    switches = global_switches()
    if switches != key.switches:
        for (name, now), (_, planned) in zip(switches, key.switches, strict=True):
            if now != planned:
                return Mismatch("mode", name, str(now)[:80], str(planned)[:80])
    changed = watched.changed(through_forward=through_forward)
    if changed is not None:
        return changed
    for i, (tensor, expected) in enumerate(zip(tensors, key.inputs, strict=True)):
        if tensor_key(tensor) != expected:
            return Mismatch("input", f"input {i}", describe_tensor(tensor_key(tensor)), describe_tensor(expected))
    if key.shared and shared_storages(tensors) != key.shared:
        return Mismatch("argument", "which inputs share their memory, where the forward writes into one")
    if not watched.alike(held):
        for (name, expected), tensor in zip(key.weights, held, strict=True):
            if tensor_key(tensor) != expected:
                return Mismatch("weight", name, describe_tensor(tensor_key(tensor)), describe_tensor(expected))
        watched.approve(held)
    untied = watched.untied(held)
    if untied:
        return Mismatch("weight", untied, "no longer the same tensor as the one it was tied to")
    if autocast_key(device) != key.autocast:
        return Mismatch("mode", "autocast", _autocast_text(autocast_key(device)), _autocast_text(key.autocast))
    return None


def reads_difference(
    joint: Joint, run_guards: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]] | None, inputs: Sequence[torch.Tensor]
) -> Mismatch | None:
    """A tensor value that Python read during capture and that is another now.

    Args:
        joint: what was captured, with the values read.
        run_guards: computes these values; None where there are none.
        inputs: what the graph takes, without the gradients that the caller gives.
    """
    if run_guards is None or joint.guards is None:
        return None
    given = dict(zip((i.node for i in joint.inputs if i.kind is not Kind.TANGENT), inputs, strict=True))
    with torch.no_grad(), torch.autocast(joint.device.type, enabled=False):
        read = run_guards([given[node.name] for node in joint.guards.find_nodes(op="placeholder")])
    for tensor, expected in zip(read, joint.host_reads, strict=True):
        value = tensor.item()
        if value != expected.value and not (value != value and expected.value != expected.value):
            return Mismatch("value", f"the value read at {expected.source}", str(value), str(expected.value))
    return None
