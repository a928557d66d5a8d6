"""What cannot be planned of a model's weights, of the call's tensors, and of those in Python state and in objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import CaptureError
from planner.graph.graph import Kind
from planner.tracer.host.arguments import Aliases
from planner.tracer.host.values import is_iterator, reachable
from planner.tracer.joint import Joint
from planner.tracer.recording import Recording


def check_given(model: nn.Module, leaves: Sequence[Any], given: Sequence[torch.Tensor]) -> None:
    """Raise CaptureError where the model's weights or the call's arguments are none that a plan can hold.

    Args:
        leaves: of the call's arguments.
        given: the tensors among them.
    """
    _check_no_weights(model, given)
    check_dense({**dict(model.named_parameters()), **dict(model.named_buffers())})
    check_dense({f"input {i}": tensor for i, tensor in enumerate(given)})
    _check_no_iterators(leaves)


def _check_no_weights(model: nn.Module, given: Sequence[torch.Tensor]) -> None:
    """Raise CaptureError where an argument is a parameter of the model: its gradients are a sum over both ways to it."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for i, tensor in enumerate(given):
        if id(tensor) in names:
            raise CaptureError(
                f"input {i} is the model's own parameter {names[id(tensor)]}: let the forward read it from the module, or pass "
                "a tensor computed from it"
            )


def check_dense(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CaptureError where a tensor is not dense (sparse, nested); `tensors`: by what messages call them."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"{name} is a {str(tensor.layout).removeprefix('torch.')} tensor: only dense tensors can be planned"
            )


def check_weights(model: nn.Module, joint: Joint) -> None:
    """Raise CaptureError where the graph does with the model's weights what no planned step does."""
    held = dict((*model.named_parameters(), *model.named_buffers()))
    for given, _ in joint.gradients:
        weight = held.get(str(given.key))  # None: a name that only the forward gave it
        if weight is not None and given.kind in (Kind.PARAM, Kind.BUFFER) and not weight.requires_grad:
            raise CaptureError(
                f"the model's forward makes {given.key} require grad, which it does not before: call requires_grad_() outside "
                "of it"
            )
    names = {id(tensor): name for name, tensor in held.items()}
    again = next((names[id(tensor)] for tensor in joint.constants.values() if id(tensor) in names), None)
    if again is not None:
        raise CaptureError(
            f"the model's backward reads {again} by itself, as an autograd.Function does that calls a module in its backward: "
            "a plan would hold it as a constant. Hand the weight to the function as an argument"
        )


def check_constants(joint: Joint, recording: Recording) -> None:
    """Raise CaptureError where the trace found a tensor in Python state in another place than the real forward."""
    found = next((recording.moved[id(tensor)] for tensor in joint.constants.values() if id(tensor) in recording.moved), None)
    if found is not None:
        raise CaptureError(
            f"the model's forward reads {found} in one call and another place in the next, where the same tensor was; a plan "
            "would read one for ever. Keep the tensors in buffers",
            module=found.module,
        )


def _check_no_iterators(leaves: Sequence[Any]) -> None:
    """Raise CaptureError where an argument is an iterator, or leads to one: no plan advances it."""
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) and any(is_iterator(value) for value in reachable([leaf])):
            kind = type(leaf).__name__
            raise CaptureError(
                f"pass what the iterator gives, not the iterator: argument leaf {i} ({kind}) is used up as it is "
                "read, and a plan would read it once, for ever"
            )


def check_tensors_in_objects(leaves: Sequence[Any], used: Iterable[torch.Tensor]) -> None:
    """Raise CaptureError where the forward uses a tensor that an object among the arguments holds: each call has its own.

    Args:
        leaves: of the call; objects are those that are no tensors.
        used: tensors that the forward did not make: constants of a graph, or what it writes into.
    """
    known = {id(tensor) for tensor in used}
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) and any(id(value) in known for value in reachable([leaf])):
            kind = type(leaf).__name__
            raise CaptureError(
                f"pass the tensors of the {kind} (argument leaf {i}) as arguments, or in tuples, lists and dicts: the forward "
                "uses tensors that this object holds, and a plan looks for its inputs nowhere else"
            )


def check_aliases(model: nn.Module, joint: Joint, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise CaptureError where a container of the call that stands in another place, too, would show what is written there."""
    if Aliases(model, joint.host).found(args, kwargs):
        raise CaptureError(
            "pass a copy in one place: a list, dictionary or object stands in two places of the call, or in Python state, too, "
            "and the forward writes into it, or asks which object is which"
        )
