"""nn.Module + example inputs -> Joint: trace forward and backward of the module itself, under fake tensors."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat.fake_tensors import InPlaceCollectiveError, forget_real_tensors
from planner._compat.switches import autocast_key, global_switches, switches_preserved
from planner.errors import CaptureError, InputError, PlannerError
from planner.log import TRACER
from planner.tracer.call import CallSpec, flatten_example
from planner.tracer.checks import check_absent_device, check_gradients_recorded, check_trainable, one_device
from planner.tracer.faults import concerns_model, note, noting
from planner.tracer.graph_checks import (
    check_aliases,
    check_constants,
    check_dense,
    check_given,
    check_tensors_in_objects,
    check_weights,
)
from planner.tracer.host.backward_reads import refuse_reads_of_written
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.lazy_values import lazy_values
from planner.tracer.host.model_keys import module_keys, weight_keys
from planner.tracer.host.preserve import contents_preserved
from planner.tracer.joint import Joint
from planner.tracer.loss import Loss
from planner.tracer.module_stack import ModuleStack
from planner.tracer.opaque.call import OpaqueCall
from planner.tracer.opaque.choose import opaque_from_start, widened
from planner.tracer.opaque.measure import measured_calls
from planner.tracer.outputs import warn_left_out
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.passes.normalize import normalize
from planner.tracer.recording import Recording, has_data, record, set_alike
from planner.tracer.refusal import capture_error
from planner.tracer.replay import Replay, Strides
from planner.tracer.target_device import TargetDevice
from planner.tracer.trace import Trace, TracedForward, TraceOptions, state_tensors, trace


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    opaque: Collection[str] = (),
    target: TargetDevice | None = None,
    replay: Replay | None = None,
    gradients: Sequence[Strides] | None = None,
    as_found: bool = False,
) -> Joint:
    """Capture one training step of `model(*args, **kwargs)` as a joint graph.

    The model is left as it was, and tracing itself allocates no tensor data. Unless a tensor has no data (meta, fake), the
    model's real forward runs first, without saved activations and until two runs do the same, to learn what Python does:
    tensor values it reads, state it changes. It runs again for every further set of opaque modules that is tried. A submodule
    that cannot be captured becomes an opaque module, which runs unplanned inside the step; it is run a few more times, with
    its backward, and measured.

    Args:
        model: in training mode, on the device it will train on.
        args, kwargs: an example call; tensors in any pytree, other leaves are held fixed.
        loss: which output backward starts from; see `planner.tracer.loss.loss_leaves`.
        opaque: qualified names of submodules to run as they are.
        gradients: strides of the gradients that come through the outputs of `loss`, in order; None: as elementwise kernels
            make them.
        target: a device that is not here, to capture for. The model and its inputs may then be on the meta device.
        replay: an earlier capture of the call, which is captured again for other gradients; its tensors may then be fake. Used
            instead of `loss`, and no forward is run.
        as_found: capture what a call does in the Python state that is found now, as a first one does that fills a cache; by
            default what later calls do, each of which finds what the one before left.

    Raises:
        InputError: the model or the inputs cannot be planned as they are.
        CaptureError: the model cannot be traced; names the operation and the user's line.
        Exception: lack of memory, and faults of the planner, as they are; see `planner.tracer.faults`.
    """
    if replay is not None:
        return _capture(model, tuple(args), dict(kwargs or {}), loss, opaque, target, replay)
    check_gradients_recorded()
    opaque, first = opaque_from_start(model, opaque), None
    if target is not None and opaque:
        raise CaptureError(f"plan on {target.name}: opaque modules ({', '.join(opaque)}) must be measured there")
    while True:
        try:
            joint = _capture(model, tuple(args), dict(kwargs or {}), loss, opaque, target, None, gradients, as_found)
            return joint if first is None else replace(joint, refused=str(first))
        except CaptureError as error:
            if target is not None or error.is_models_own:
                raise
            first = first or error
            before, opaque = opaque, widened(model, tuple(opaque), error.module)
            if not opaque:
                raise _with_later(first, error, before) from None
            more = ", ".join(repr(name) for name in opaque if name not in before)
            TRACER.info("%s: capture again, with %s opaque: %s", type(model).__name__, more, error)


def _with_later(first: CaptureError, last: CaptureError, opaque: Collection[str]) -> CaptureError:
    """The first error; where submodules that then ran as they are met another one, with that."""
    if last is first or str(last) in str(first):
        return first
    return CaptureError(f"{str(first).rstrip('.')}. With {', '.join(opaque)} run as it is: {last}", module=first.module)


_lock = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While one thread plans, the others wait.

    Capturing patches classes and kernels of the whole process. And a process that is forked while another thread runs kernels
    may hang: a lock that the thread holds stays locked in the child. A thread of autograd's, which runs the backward of a step
    that the planning thread waits for, does not wait.
    """
    if _steps and threading.current_thread().name.startswith("Dummy"):  # which Python has not started
        yield
        return
    with _lock:
        yield


_steps: list[None] = []


@contextmanager
def running_steps() -> Iterator[None]:
    """While entered, the thread that plans runs real steps."""
    _steps.append(None)
    try:
        yield
    finally:
        _steps.pop()


@contextmanager
def collections_paused() -> Iterator[None]:
    """While entered, Python collects no garbage: it would look again and again through the objects of a graph, which stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _renew_lock() -> None:
    """The thread that holds the lock does not exist in a forked child, whose own thread may capture (another backward)."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # which only systems that fork have
    os.register_at_fork(after_in_child=_renew_lock)

IS_CAPTURING: ContextVar[bool] = ContextVar("a model is being captured", default=False)
"""Installed plans call the model's own forward: a plan is made of that, not of a plan."""


def _capture(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    loss: Loss,
    opaque: Collection[str],
    target: TargetDevice | None,
    replay: Replay | None = None,
    gradients: Sequence[Strides] | None = None,
    as_found: bool = False,
) -> Joint:
    """One capture with these opaque modules: check, record, trace, bring into normal form, check."""
    leaves, in_spec = flatten_example(args, kwargs)
    call = _specified(leaves, in_spec)
    given = [leaves[i] for i in call.tensors]
    check_trainable(model, len(given))
    check_given(model, leaves, given)
    device = _device(model, given, target)
    tensors = _as_leaves(given)
    caches_casts = torch.is_autocast_cache_enabled()
    modules = ModuleStack(model)
    with (
        one_at_a_time(),
        collections_paused(),
        Generators(device).preserved(),
        _gradients_kept(model),
        switches_preserved(after_success=False),
        _capturing() as inside,
    ):
        with _explained(model, modules):
            recording = Recording() if replay is None else Recording.of_replay(model, replay)
            if replay is None and has_data(model, tensors, fakes_run=target is None):
                originals = {id(ours): theirs for ours, theirs in zip(tensors, given, strict=True) if ours is not theirs}
                known = (tuple(opaque), device, modules, originals)
                recording = inside(record, model, call, tensors, *known, as_found=as_found)
                check_tensors_in_objects(call.leaves, recording.written)
                check_dense({str(path): path.get(model) for path in recording.host.state})
        try:
            with _explained(model, modules):
                options = TraceOptions(model, call, loss, gradients, recording, modules, target, replay, caches_casts)
                traced = _traced(options, tensors, inside)
            weights, keys = weight_keys(model), module_keys(model)
            held = state_tensors(model, recording, replay)
        finally:
            inside(recording.restore)
    warn_left_out(model, traced.forward.outputs)
    joint = _normalized(model, traced, recording, call, device, [tensor.is_leaf for tensor in (*given, *held)])
    if replay is None:
        check_aliases(model, joint, args, kwargs)
        with one_at_a_time(), Generators(device).preserved(), _capturing() as inside, _explained(model, modules):
            joint = inside(_run_again, joint, model, recording, call, tensors)
    return replace(
        joint,
        weights=weights,
        modules=keys,
        repeats=traced.repeats,
        absent_device="" if target is None else target.name,
        autocast=autocast_key(device),
        switches=global_switches(),
    )


def _specified(leaves: Sequence[Any], in_spec: Any) -> CallSpec:
    """The form of a call, without its tensors."""
    positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    return CallSpec(in_spec, tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), positions, None)


def _traced(options: TraceOptions, tensors: Sequence[torch.Tensor], inside: Callable[..., Any]) -> Trace:
    """Trace forward and backward; `inside` calls a function in the context of the capture.

    Raises:
        CaptureError: code of the model's own that runs in the backward changes Python state, or reads what the forward left.
    """
    recording, found = options.recording, list[Trace]()
    refuse_reads_of_written(recording.host.key)
    host = Generators(torch.device("cpu"))
    before, after = host.host(), list[Any]()

    def run() -> None:
        found.append(inside(trace, options, tensors))
        after.append(host.host())

    if recording.has_backward_code and recording.preserved is not None:
        changes = recording.preserved.changed_by(run)
    else:
        run()
        changes = False
    if changes or found[0].forward.written_later():
        raise CaptureError(
            "the model's backward changes Python state (a hook on an activation that keeps its gradient, a Function that "
            "counts) or the call's arguments, which a plan would not do. Do it in a hook on the model's output or on a "
            "parameter, or in the forward"
        )
    if recording.has_backward_code and after[0] != before:
        raise CaptureError(
            "the model's backward draws from Python's or numpy's random generator (in a hook on an activation, or in a "
            "Function), of which a plan would hold one draw. Draw by torch, or outside of the model"
        )
    return found[0]


def _as_leaves(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of a call without what they were computed from; one tensor in two places stays one."""
    leaves = {id(tensor): tensor if tensor.is_leaf else tensor.detach().requires_grad_() for tensor in given}
    return [leaves[id(tensor)] for tensor in given]


def _device(model: nn.Module, given: Sequence[torch.Tensor], target: TargetDevice | None) -> torch.device:
    """Where the step runs: on the model's and the call's one device, or on an absent one."""
    if target is None:
        return one_device(model, given)
    check_absent_device(target)
    return target.device


def _normalized(
    model: nn.Module, traced: Trace, recording: Recording, call: CallSpec, device: torch.device, leaves: Sequence[bool]
) -> Joint:
    """The trace's graph in normal form, checked; `leaves`: as of TracedGraph."""
    forward = traced.forward
    with noting(f"bringing the graph of {type(model).__name__} into normal form"), collections_paused():
        try:
            graph = TracedGraph.of(
                traced.exported,
                traced.names,
                device=device,
                num_results=forward.num_results,
                reads=forward.reads,
                leaves=leaves,
                uses=traced.uses,
                moving=_moving(recording, forward, len(call.tensors)),
                calls=recording.calls,
            )
            joint = normalize(graph, replace(call, out_spec=forward.out_spec, returned=forward.returned), forward.outputs)
        finally:
            forget_real_tensors(node.meta.get("val") for node in traced.exported.graph_module.graph.nodes)
    check_weights(model, joint)
    check_constants(joint, recording)
    check_tensors_in_objects(call.leaves, joint.constants.values())
    host = replace(recording.host, effects=forward.effects)
    return replace(joint, left=forward.left, host=host, recorded=recording.reads)


def _run_again(joint: Joint, model: nn.Module, recording: Recording, call: CallSpec, tensors: Sequence[torch.Tensor]) -> Joint:
    """The joint graph with what further runs show: costs of opaque calls, plain values that a first call sets.

    What running them changes outside of their modules is restored, too.
    """
    measured: dict[str, OpaqueCall] = {}
    if recording.to_measure and recording.preserved is not None:
        with contents_preserved(recording.written), iterators_copied():
            recording.preserved.changed_by(lambda: measured.update(measured_calls(joint, model, recording.to_measure)))
    host = joint.host
    written = [*host.key.left, *(effect.path for effect in host.effects)]
    lazy = set_alike(model, call, tensors, lazy_values(model, recording.settled, written), recording)
    return replace(joint, opaque_calls=measured or joint.opaque_calls, host=replace(host, lazy=lazy))


def _moving(recording: Recording, forward: TracedForward, num_tensors: int) -> frozenset[int]:
    """Positions, after the call's tensors, of the tensors of Python state that the forward replaces."""
    written = [effect.path for effect in forward.effects]
    places = enumerate(recording.host.state, start=num_tensors)
    return frozenset(i for i, path in places if any(path.is_inside(other) for other in written))


@contextmanager
def _capturing() -> Iterator[Callable[..., Any]]:
    """While entered, IS_CAPTURING is set. Calls what it is given in a context whose variables the model may set."""
    token = IS_CAPTURING.set(True)
    context = copy_context()
    try:
        yield context.run
    finally:
        IS_CAPTURING.reset(token)


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """At exit, parameters have the gradients that they had at entry.

    Raises:
        CaptureError: a backward accumulated in them while it was traced.
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


@contextmanager
def _explained(model: nn.Module, modules: ModuleStack) -> Iterator[None]:
    """What the model or torch raises while it is captured becomes an error that names the user's line."""
    try:
        yield
    except PlannerError:
        raise
    except InPlaceCollectiveError as error:
        raise InputError(_IN_PLACE.format(error, modules.last_kernel)) from error
    except Exception as error:
        where = modules.last_kernel
        if not concerns_model(error):
            note(error, f"capturing {type(model).__name__}{f' (last at {where})' if where else ''}")
            raise
        raise capture_error(error, where, is_models_own=modules.fails_alone) from error
