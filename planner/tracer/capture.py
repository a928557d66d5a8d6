"""nn.Module + example inputs -> Joint: trace forward and backward of the module itself, under fake tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat.fake_tensors import InPlaceCollectiveError
from planner._compat.joint_export import ExportedJoint
from planner.errors import CaptureError, InputError, PlannerError
from planner.graph.graph import Kind
from planner.log import TRACER
from planner.tracer import parts
from planner.tracer.call import CallSpec, flatten_example
from planner.tracer.checks import check_elsewhere, check_trainable, one_device
from planner.tracer.elsewhere import Elsewhere
from planner.tracer.faults import concerns_model, note, noting
from planner.tracer.host.generators import Generators
from planner.tracer.host.state import remembered, weight_keys
from planner.tracer.joint import Joint
from planner.tracer.loss import Loss
from planner.tracer.normalize import normalize
from planner.tracer.outputs import warn_left_out
from planner.tracer.refusal import refusal
from planner.tracer.replay import Replay
from planner.tracer.traced import Step


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    opaque: Collection[str] = (),
    elsewhere: Elsewhere | None = None,
    replay: Replay | None = None,
) -> Joint:
    """Capture one training step of `model(*args, **kwargs)` as a joint graph.

    The model is left as it was, and tracing itself allocates no tensor data. Unless a tensor has no data (meta, fake), the
    model's real forward runs first (2 to 4 times, without saved activations), to learn what Python does: tensor values it
    reads, state it changes. A submodule that cannot be captured becomes an opaque module, which runs unplanned inside the
    step; it is run a few more times, with its backward, and measured.

    Args:
        model: in training mode, on the device it will train on.
        args, kwargs: an example call; tensors in any pytree, other leaves are held fixed.
        loss: which output backward starts from; see `planner.tracer.loss.loss_leaves`.
        opaque: qualified names of submodules to run as they are.
        elsewhere: a device that is not here, to capture for. The model and its inputs may then be on the meta device.
        replay: the call was captured before, and is again for other gradients; its tensors may then be fake. Takes the place
            of `loss`, and nothing is run.

    Raises:
        InputError: the model or the inputs cannot be planned as they are.
        CaptureError: the model cannot be traced; names the operation and the user's line.
        Exception: lack of memory, and faults of the planner, as they are; see `planner.tracer.faults`.
    """
    if replay is not None:
        return _capture(model, tuple(args), dict(kwargs or {}), loss, opaque, elsewhere, replay)
    opaque, first = parts.parts_from_start(model, opaque), None
    if elsewhere is not None and opaque:
        raise CaptureError(
            f"{', '.join(opaque)} cannot be captured and would run as it is, and what that takes is measured on the device: "
            f"plan where {elsewhere.name} is"
        )
    while True:
        try:
            joint = _capture(model, tuple(args), dict(kwargs or {}), loss, opaque, elsewhere)
            return joint if first is None else replace(joint, refused=str(first))
        except CaptureError as error:
            if elsewhere is not None:
                raise
            first = first or error
            before, opaque = opaque, parts.widened(model, tuple(opaque), error.module)
            if not opaque:
                raise first from None
            more = ", ".join(repr(name) for name in opaque if name not in before)
            TRACER.info("%s: capture again, with %s opaque: %s", type(model).__name__, more, error)


_lock = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While one thread plans, the others wait.

    Capturing patches classes and kernels of the whole process. And a process that is forked while another thread runs kernels
    may hang: a lock that the thread holds stays locked in the child.
    """
    with _lock:
        yield


def _renew_lock() -> None:
    """The thread that holds the lock does not exist in a forked child, whose own thread may capture (another backward)."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # which only systems that fork have
    os.register_at_fork(after_in_child=_renew_lock)

IS_CAPTURING: ContextVar[bool] = ContextVar("a model is being captured", default=False)
"""Installed plans stand aside: a plan is made of the model's own forward, not of a plan."""


def _capture(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    loss: Loss,
    opaque: Collection[str],
    elsewhere: Elsewhere | None,
    replay: Replay | None = None,
) -> Joint:
    leaves, in_spec = flatten_example(args, kwargs)
    tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    check_trainable(model, len(tensors))
    if elsewhere is None:
        device = one_device(model, [leaves[i] for i in tensors])
    else:
        check_elsewhere(elsewhere)
        device = elsewhere.device
    template = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    step = Step(model, template, tensors, in_spec, loss, elsewhere)
    step.parts, step.device = tuple(opaque), device
    if replay is not None:
        step.replay, step.calls = replay, dict(replay.calls)
        step.recorded = None if replay.recorded is None else list(replay.recorded)
        step.host, step.preserved = replay.host, remembered(model, replay.host.key)
    given = [leaves[i] if leaves[i].is_leaf else leaves[i].detach().requires_grad_() for i in tensors]
    with one_at_a_time(), Generators(device).preserved(), _gradients_kept(model):
        token = IS_CAPTURING.set(True)
        context = copy_context()  # in which the model may set context variables, and in which they are put back
        try:
            exported = context.run(_export, step, given)
            weights = weight_keys(model)
        finally:
            context.run(step.restore)
            IS_CAPTURING.reset(token)
    warn_left_out(model, step.outputs)
    with noting(f"bringing the graph of {type(model).__name__} into normal form"):
        joint = normalize(
            exported,
            names=step.names,
            outputs=step.outputs,
            num_results=step.num_results,
            reads=step.reads,
            call=CallSpec(in_spec, template, tensors, step.out_spec),
            device=device,
            parts=step.calls,
            moving=step.moving,
        )
    _check_weights(model, joint)
    return replace(
        joint,
        weights=weights,
        left=tuple(step.left),
        host=replace(step.host, effects=tuple(step.effects)),
        elsewhere="" if elsewhere is None else elsewhere.name,
        recorded=None if step.recorded is None else tuple(step.recorded),
    )


def _check_weights(model: nn.Module, joint: Joint) -> None:
    """Raise CaptureError where the graph does with the model's weights what no planned step does."""
    held = dict((*model.named_parameters(), *model.named_buffers()))
    for given, _ in joint.gradients:
        weight = held.get(str(given.key))  # None: a second name that the forward gives it, which is gone again
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


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """At exit, parameters have the gradients they had.

    Raises:
        CaptureError: they had others: a backward accumulated in them while it was traced.
    """
    before = [(name, parameter, parameter.grad) for name, parameter in model.named_parameters()]
    changed = ""
    try:
        yield
    finally:
        for name, parameter, gradient in before:
            if parameter.grad is not gradient:
                parameter.grad, changed = gradient, name
    if changed:
        raise CaptureError(
            f"the model's backward accumulates a gradient in {changed} on its own (backward() inside of an autograd.Function, "
            "as reversible networks call it), which a plan would not do"
        )


_IN_PLACE = (
    "{} at {}: torch.distributed's collectives write in place, which no graph can hold. Use the functional ones "
    "(torch.distributed._functional_collectives.all_reduce(x, 'sum', group) and its like), communicate outside of forward, or "
    "plan submodules that do not communicate"
)


def _export(step: Step, tensors: Sequence[torch.Tensor]) -> ExportedJoint:
    """Learn what Python does in real forwards, then trace."""
    try:
        if step.can_run(tensors):
            step.record(tensors)
        step.hold_weights()
        return step.export([*tensors, *step.state_inputs()])
    except PlannerError:
        raise
    except InPlaceCollectiveError as error:
        raise InputError(_IN_PLACE.format(error, step.where)) from error
    except Exception as error:
        if not concerns_model(error):
            note(error, f"capturing {type(step.model).__name__}{f' (last at {step.where})' if step.where else ''}")
            raise
        raise refusal(error, step.where) from error
