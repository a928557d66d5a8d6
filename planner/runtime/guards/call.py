"""CallGuard: whether a call is the one that was planned for. Everything that the capture held fixed is compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.switches import Autocast, autocast_key, global_switches
from planner._compat.tensors import shared_storages, storage_of
from planner.errors import first_line
from planner.graph.graph import Kind
from planner.log import RUNTIME
from planner.runtime.codegen import boxed, picker, positions
from planner.runtime.guards.backward import BackwardGuard, StateAtForward
from planner.runtime.guards.call_key import (
    CallKey,
    are_same,
)
from planner.runtime.guards.mismatch import Mismatch, MismatchKind
from planner.runtime.guards.model_state import ModelStateGuard
from planner.runtime.guards.tensor_reads import TensorReadGuard
from planner.runtime.step import RewrittenStep
from planner.tracer.call import CallSpec
from planner.tracer.host.arguments import Aliases
from planner.tracer.host.counts import Number
from planner.tracer.host.fingerprint import (
    Difference,
    Fingerprint,
    alike,
    first_difference,
    of_argument,
    tensor_difference,
    tensor_key,
)
from planner.tracer.host.lazy_values import values_set
from planner.tracer.host.state import LazyValue
from planner.tracer.host.tensor_identity import own_tensor_class
from planner.tracer.joint import Joint


def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(forward).parameters)
    except (TypeError, ValueError):  # it has none that Python knows
        return frozenset()


@dataclass(frozen=True, slots=True)
class MatchedCall:
    """A call that is the planned one.

    Attributes:
        tensors: the call's tensor leaves, then the tensors that Python state holds.
        inputs: the forward graph's inputs, in order.
        args, kwargs: the call.
        lazy: what this call, as the first one, sets in Python state before it runs.
        counts: the numbers that it leaves in the places of `HostState.counts`.
        state: compares what code of the model's own reads in this call's backward; None where there is no such code.
    """

    tensors: list[torch.Tensor]
    inputs: Sequence[torch.Tensor]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    lazy: tuple[LazyValue, ...] = ()
    counts: Sequence[Number] = ()
    state: StateAtForward | None = None


class CallGuard:
    """Compares calls of one model with the call that its step was captured from."""

    def __init__(self, model: nn.Module, step: RewrittenStep) -> None:
        self._model, self._step = model, step
        self._model_state = ModelStateGuard(model, step.joint)
        self._tensor_reads = TensorReadGuard(model, step.joint)
        self._backward = BackwardGuard(model, step, self._model_state)
        self._select_inputs = picker(positions(step))
        self._leaves = [(int(given.key), given.is_leaf) for given in step.joint.inputs if given.is_leaf is not None]
        self._aliases = Aliases(model, step.joint.host)
        self._named = _parameters_of(model.forward)
        self._unnamed = [name for name in step.joint.call.keywords if name not in self._named]
        self._read_values = None if step.joint.guards is None else boxed(step.joint.guards)

    def match(self, args: Any, kwargs: Any, *, through_forward: bool = False) -> MatchedCall | Mismatch:
        """The graph's inputs for this call, or the first thing that is not as planned; see `HostStateGuard.mismatch`.

        An error while comparing counts as a mismatch: planned objects compared without one.
        """
        try:
            found, lazy = self._match(args, kwargs, through_forward), self._step.joint.host.lazy
            if not (isinstance(found, Mismatch) and lazy and all(value.is_unset(self._model) for value in lazy)):
                return found
            with values_set(self._model, lazy):
                again = self._match(args, kwargs, through_forward)
            if isinstance(again, Mismatch):
                return replace(again, cure=again.cure or _FIRST_CALL) if again.kind == "host" else again
            return replace(again, lazy=lazy)
        except Exception as error:
            RUNTIME.debug("a call cannot be compared with the planned one", exc_info=True)
            text = f"the call could not be compared: {first_line(error)}"
            return Mismatch("host", "what the call was compared with", text=text)

    def forget(self) -> None:
        """Hold no Python state that an earlier call carried; see `HostStateGuard.forget`."""
        host = self._step.joint.host
        if host.state or host.as_found:
            self._model_state.forget()

    def _match(self, args: Any, kwargs: Any, through_forward: bool) -> MatchedCall | Mismatch:
        joint, key = self._step.joint, self._step.key
        if joint.absent_device:
            text = f"planned for {joint.absent_device}, which is not here"
            return Mismatch("device", "the device", text=text, cure="Save the plan, and apply it there")
        tensors, mismatch = flatten_call(joint.call, args, kwargs, key.arguments)
        if mismatch is not None:
            return mismatch
        if len(kwargs) > 1 and [name for name in kwargs if name not in self._named] != self._unnamed:
            text = "keyword arguments that the forward takes as **kwargs come in another order"
            return Mismatch("argument", "the order of the keyword arguments", text=text)
        if (self._aliases.compares_identities or not joint.call.is_flat) and self._aliases.found(args, kwargs):
            text = (
                "one list, dictionary or object stands in two places, and the forward writes into such or asks which is which"
            )
            return Mismatch("argument", "which containers are the same one", text=text)
        held = self._model_state.held()
        if held is None:
            return self._model_state.missing()
        mismatch = difference(key, self._model_state, held, tensors, joint.device, through_forward=through_forward)
        if mismatch is not None:
            return mismatch
        mismatch = self._tensor_reads.mismatch(held, tensors)
        if mismatch is not None:
            return mismatch
        state = [path.get(self._model) for path in joint.host.state]
        for path, found in zip(joint.host.state, state, strict=True):
            if not isinstance(found, torch.Tensor):
                return Mismatch("host", str(path), type(found).__name__, "a tensor")
        for path, i in joint.host.shared:
            if path.get(self._model) is not state[i]:
                return Mismatch("host", str(path), "another tensor", f"the one that {joint.host.state[i]} holds")
        if key.shared and {*map(storage_of, state)} & {*map(storage_of, tensors)} - {None}:
            text = "Python state holds a tensor that shares its memory with an input, and the forward writes into one"
            return Mismatch("host", "which tensors share their memory", text=text)
        given = [*tensors, *state]
        for i, is_leaf in self._leaves:
            if given[i].is_leaf != is_leaf:
                return Mismatch("input", f"input {i}", _LEAF[given[i].is_leaf], _LEAF[is_leaf])
        counted = self._counted()
        if isinstance(counted, Mismatch):
            return counted
        inputs = self._select_inputs((*held, *given, *joint.constants.values()))
        found = reads_difference(joint, self._read_values, inputs)
        return found or MatchedCall(given, inputs, args, kwargs, counts=counted, state=self._backward.of_call())

    def _counted(self) -> Sequence[Number] | Mismatch:
        """The numbers that the call leaves where the forward counts."""
        counts = self._step.joint.host.counts
        if not counts.is_apart(self._model):
            return Mismatch("host", str(counts.places[0]), text=f"{counts.places[0]} and another count are the same one now")
        left = counts.follow(counts.found(self._model))
        return Mismatch("host", left.where, left.now, left.planned) if isinstance(left, Difference) else left


_LEAF = {True: "a leaf", False: "computed by an earlier step"}
"""Of autograd: the two get gradients with different strides."""

_FIRST_CALL = "The model's first call changes it: run a forward under torch.no_grad(), then plan"


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
            now = of_argument(leaf)
            if not alike(prints[i], now):
                return [], _argument_mismatch(first_difference(prints[i], now, f"argument leaf {i}"))
    return [leaves[i] for i in call.tensors], None


def _argument_mismatch(found: Difference) -> Mismatch:
    if found.now != found.planned:
        return Mismatch("argument", found.where, found.now, found.planned)
    cure = "Pass tensors in tuples, lists and dicts: a plan looks for them there" if found.is_tensor else ""
    return Mismatch("argument", found.where, text=f"{found.where} is another object than in the planned call", cure=cure)


def _is_plain_equal(leaf: Any, expected: Any) -> bool:
    """A fast test: True means equal, False says nothing."""
    return leaf is expected and (leaf is None or type(leaf) in (bool, int, str, float))


def difference(
    key: CallKey,
    model_state: ModelStateGuard,
    held: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    *,
    through_forward: bool = False,
) -> Mismatch | None:
    """The first part of the key that does not hold for a call.

    Args:
        held: the model's tensors, in the order of `key.weights`.
        tensors: the call's.
        through_forward: see `HostStateGuard.mismatch`.
    """
    if not torch.is_grad_enabled():
        return Mismatch("mode", "grad mode", "disabled")
    switches = global_switches()
    if switches != key.switches:
        for (name, now), (_, planned) in zip(switches, key.switches, strict=True):
            if now != planned:
                return Mismatch("mode", name, str(now)[:80], str(planned)[:80])
    changed = model_state.mismatch(through_forward=through_forward)
    if changed is not None:
        return changed
    kinds = tuple(map(type, tensors))
    if kinds != key.kinds:
        i = next(i for i, kind in enumerate(kinds) if kind is not key.kinds[i])
        return Mismatch("argument", f"the class of input {i}", kinds[i].__qualname__, key.kinds[i].__qualname__)
    for i, (tensor, expected) in enumerate(zip(tensors, key.inputs, strict=True)):
        if tensor_key(tensor) != expected:
            return _mismatch("input", tensor_difference(expected, tensor_key(tensor), f"input {i}"))
    if key.shared and shared_storages(tensors) != key.shared:
        text = "other inputs share their memory than in the planned call, and the forward writes into one"
        return Mismatch("argument", "which inputs share their memory", text=text)
    other = _other_identities(key, held, tensors)
    if other is not None:
        return other
    if not model_state.alike(held):
        for (name, expected), tensor in zip(key.weights, held, strict=True):
            if tensor_key(tensor) != expected:
                return _mismatch("weight", tensor_difference(expected, tensor_key(tensor), name))
        classes = dict(model_state.weight_classes)
        for (name, _), tensor in zip(key.weights, held, strict=True):
            now, planned = own_tensor_class(tensor), classes.get(name)
            if now is not planned:
                now_text, planned_text = ("torch's" if kind is None else kind.__qualname__ for kind in (now, planned))
                return Mismatch("weight", f"the class of {name}", now_text, planned_text)
        model_state.approve(held)
    untied = model_state.untied(held)
    if untied:
        return Mismatch("weight", untied, "no longer the same tensor as the one it was tied to")
    if len({*map(id, held)}) != len(held):  # gradients would add up in another order
        name = next(name for i, (name, _) in enumerate(key.weights) if any(held[i] is other for other in held[:i]))
        return Mismatch("weight", name, "tied to another one")
    if autocast_key(device) != key.autocast:
        return Mismatch("mode", "autocast", _autocast_text(autocast_key(device)), _autocast_text(key.autocast))
    return None


def _mismatch(kind: MismatchKind, found: Difference) -> Mismatch:
    return Mismatch(kind, found.where, found.now, found.planned)


def _other_identities(key: CallKey, held: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Mismatch | None:
    """Inputs that are one tensor, or a parameter, and were not in the planned call: gradients would add up in another order."""
    if max(key.same, default=-1) < 0:
        return None
    if not are_same(key.same, tensors):
        text = "not the same inputs are one tensor as in the planned call, which decides how gradients add up"
        return Mismatch("argument", "which inputs are the same tensor", text=text)
    weights = {id(tensor) for tensor in held if tensor.requires_grad}
    own = next((i for i, tensor in enumerate(tensors) if id(tensor) in weights), None)
    if own is None:
        return None
    text = f"input {own} is one of the model's own parameters, whose gradients would add up in another order"
    return Mismatch("argument", f"input {own}", text=text)


def _autocast_text(autocast: Autocast) -> str:
    return "off" if autocast is None else f"to {str(autocast).removeprefix('torch.')}"


def reads_difference(
    joint: Joint, read_values: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]] | None, inputs: Sequence[torch.Tensor]
) -> Mismatch | None:
    """The first tensor value that Python read during the capture (`if mask.any():`) and that is another one now.

    Args:
        joint: the captured step, with the values that were read.
        read_values: computes these values; None where there are none.
        inputs: the forward graph's.
    """
    if read_values is None or joint.guards is None:
        return None
    given = dict(zip((i.node for i in joint.inputs if i.kind is not Kind.TANGENT), inputs, strict=True))
    with torch.no_grad(), torch.autocast(joint.device.type, enabled=False):
        read = read_values([given[node.name] for node in joint.guards.find_nodes(op="placeholder")])
    for tensor, expected in zip(read, joint.host_reads, strict=True):
        value = tensor.item()
        if value != expected.value and not (value != value and expected.value != expected.value):
            return Mismatch("value", f"the value read at {expected.source}", str(value), str(expected.value))
    return None
