"""Trace one call of the model, forward and backward, as a function of flat tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner._compat.fake_tensors import fake_inputs, forget_real_tensors, stand_ins
from planner._compat.joint_export import ExportedJoint, export_joint
from planner._compat.kernels import kernels_replaced
from planner.tracer import raising
from planner.tracer.call import CallSpec
from planner.tracer.casts import AutocastCasts
from planner.tracer.constants import Constants
from planner.tracer.host.arguments import Returned
from planner.tracer.host.library_reads import check_traced
from planner.tracer.host.preserve import contents_preserved, model_preserved
from planner.tracer.host.shared_containers import held_containers, returned_state
from planner.tracer.host.state import Effect
from planner.tracer.host.tensor_places import TensorPlace
from planner.tracer.host.tensor_reads import answered
from planner.tracer.host.written_values import rebuilt
from planner.tracer.joint import Output
from planner.tracer.loss import Loss, flatten_output, loss_leaves
from planner.tracer.model_call import run_call
from planner.tracer.module_stack import ModuleStack
from planner.tracer.opaque import traced as opaque_traced
from planner.tracer.outputs import check_constant
from planner.tracer.recording import Recording
from planner.tracer.replay import Replay, Strides, usual_strides
from planner.tracer.results import Results, add_left, add_outputs, reassigned_buffers
from planner.tracer.target_device import TargetDevice
from planner.tracer.trace_mode import TracedRead, TraceMode
from planner.tracer.units import once
from planner.tracer.units.trace import Units


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What is traced.

    Attributes:
        model: whose call it is.
        call: the call; its `out_spec` is not known yet.
        loss: which output backward starts from.
        gradients: strides of the gradients that come through the outputs of `loss`; None: as elementwise kernels make them.
        recording: of real forwards.
        modules: the stack of running submodules.
        target: a device that is not here; None for this machine's.
        replay: what is known of the call from an earlier capture.
        caches_casts: autocast's cache is enabled where the model is called.
    """

    model: nn.Module
    call: CallSpec
    loss: Loss
    gradients: Sequence[Strides] | None
    recording: Recording
    modules: ModuleStack
    target: TargetDevice | None
    replay: Replay | None
    caches_casts: bool


@dataclass(frozen=True, slots=True)
class TracedForward:
    """What the traced forward found.

    Attributes:
        outputs: one per leaf of the model's output.
        out_spec: the output's structure.
        returned: as of CallSpec.
        num_results: number of tensors that are outputs or left in Python state; after them come those that Python read.
        reads: what it read of each of those.
        left: one Output per tensor that the forward leaves in Python state.
        effects: how a planned call writes them there.
        written_later: whether the backward, too, has written into the call's lists and dictionaries.
    """

    outputs: tuple[Output, ...]
    out_spec: Any
    returned: tuple[Returned, ...]
    num_results: int
    reads: tuple[TracedRead, ...]
    left: tuple[Output, ...]
    effects: tuple[Effect, ...]
    written_later: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced call.

    Attributes:
        exported: the joint graph as torch made it.
        names: the model's parameter and buffer names by the names in `exported`.
        forward: what the traced forward found.
        uses: by a parameter's or buffer's name, or a position among the tensors, how many operations' gradients reach it.
        repeats: kind of equal blocks that were traced once -> their names.
    """

    exported: ExportedJoint
    names: Mapping[str, str]
    forward: TracedForward
    uses: Mapping[str | int, int]
    repeats: Mapping[str, tuple[str, ...]]


def trace(options: TraceOptions, tensors: Sequence[torch.Tensor]) -> Trace:
    """Trace forward and backward under fake tensors.

    Args:
        tensors: one per tensor leaf of the call; leaves of autograd. The tensors of Python state are added.

    Raises:
        CaptureError: the model cannot be traced.
        Exception: errors of the model and of torch, as they are; `options.modules.last_kernel` says where.
    """
    reads = options.recording.host.key.tensors
    opaque = {call.module for call in options.recording.calls.values()}
    inside = {f"{name}.{inner}".strip(".") for name in opaque for inner, _ in options.model.get_submodule(name).named_modules()}
    apart = inside | {name for read in reads for name in (read.module, read.place.module)}
    (module, exported), repeats = once.trace(options.model, apart, lambda units: _trace(options, tensors, units))
    assert module.found is not None
    uses = dict(module.uses)
    for template, *others in repeats.values():  # which were not traced
        own = {str(name).removeprefix(template): n for name, n in module.uses.items() if str(name).startswith(f"{template}.")}
        uses |= {f"{other}{name}": n for other in others for name, n in own.items()}
    return Trace(exported, module.names, module.found, uses, repeats)


def _trace(options: TraceOptions, tensors: Sequence[torch.Tensor], units: Units) -> tuple[_TracedModule, ExportedJoint]:
    recording, target = options.recording, options.target
    module = _TracedModule(options, units)
    given = [*tensors, *_state_inputs(options)]
    asks = recording.host.key.compares_identities
    module.same = tuple(
        next(j for j, other in enumerate(given) if other is tensor) if asks or tensor.requires_grad else i
        for i, tensor in enumerate(given)  # else the inputs of later calls may be different tensors
    )
    with opaque_traced.known(recording.calls), units.known(), kernels_replaced(raising.substitutes()):
        if target is None:
            fakes = fake_inputs(given)
            try:
                exported = export_joint(module, fakes)
                return module, units.spliced(exported, module.names)
            except BaseException:
                forget_real_tensors(fakes)  # what an error's traceback holds holds no tensor of the model's
                raise
        with target.autocasting():
            exported = export_joint(module, module.hold_fakes(given), target.choices)
        return module, target.corrected(units.spliced(exported, module.names))


def _state_inputs(options: TraceOptions) -> list[torch.Tensor]:
    """The tensors of Python state, as leaves of autograd."""
    found = state_tensors(options.model, options.recording, options.replay)
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in found]


def state_tensors(model: nn.Module, recording: Recording, replay: Replay | None) -> Sequence[torch.Tensor]:
    """The tensors of Python state that the call finds; of a replay, tensors like them."""
    return [path.get(model) for path in recording.host.state] if replay is None else replay.state


class _TracedModule(nn.Module):
    """The module that torch traces: flat tensors in, flat tensors out, every parameter exactly once (tied ones too).

    Attributes:
        names: unique parameters' and buffers' names in the model, by their names here.
        found: by the last forward; torch runs more than one.
        uses: in the last forward; see Trace.
        same: per tensor that it is called with, the position of the one that the model is given for it.
    """

    def __init__(self, options: TraceOptions, units: Units) -> None:
        super().__init__()
        self._units = units
        self._options = options  # a dataclass hides the model, which is no submodule: its parameters are not listed twice
        self.names: dict[str, str] = {}
        self.found: TracedForward | None = None
        self.uses: dict[str | int, int] = {}
        self.same: tuple[int, ...] = ()
        for i, (name, parameter) in enumerate(options.model.named_parameters()):
            self.register_parameter(f"p{i}", parameter)
            self.names[f"p{i}"] = name
        empty = {path.place for path, found in options.recording.host.found if found is None and not path.steps}
        buffers = [(name, buffer) for name, buffer in options.model.named_buffers() if name not in empty]
        for i, (name, buffer) in enumerate(buffers):  # a call that is captured again may have filled some
            self.register_buffer(f"b{i}", buffer)
            self.names[f"b{i}"] = name

    def hold_fakes(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hold fake tensors instead of weights from now on, and return the inputs as such."""
        held = (*self.named_parameters(), *self.named_buffers())
        made = stand_ins([*(tensor for _, tensor in held), *tensors])
        for (name, _), fake in zip(held, made, strict=False):
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(fake, fake.requires_grad)
            else:
                self._buffers[name] = fake
        return made[len(held) :]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Results, then tensors that Python read."""
        weights = {name: getattr(self, here) for here, name in self.names.items()}
        self.found, returned = _traced_forward(self._options, self._units, [tensors[i] for i in self.same], weights)
        self.uses = _uses(returned, [*weights.items(), *enumerate(tensors)])
        return returned


def _uses(results: Sequence[torch.Tensor], inputs: Iterable[tuple[str | int, torch.Tensor]]) -> dict[str | int, int]:
    """By the inputs' names, the number of edges that lead to each in the autograd graph of the results.

    Negative where one of them comes from a Function in Python, which may return no gradient, or a sum of several.
    """
    found: Counter[Any] = Counter()
    from_python: set[Any] = set()
    todo, seen = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None], set[Any]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            for following, i in node.next_functions:
                leaf = getattr(following, "variable", None)
                edge = (following, i) if leaf is None else id(leaf)
                found[edge] += 1
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    from_python.add(edge)
                todo += [following] if following is not None else []
    edges = {name: id(t) if t.grad_fn is None else (t.grad_fn, t.output_nr) for name, t in inputs}
    return {name: -found[edge] if edge in from_python else found[edge] for name, edge in edges.items()}


def _traced_forward(
    options: TraceOptions, units: Units, tensors: Sequence[torch.Tensor], given: Mapping[str, torch.Tensor]
) -> tuple[TracedForward, tuple[torch.Tensor, ...]]:
    """Run the model's forward on traced tensors.

    Args:
        units: its equal blocks.
        tensors: the call's, then those of Python state.
        given: the model's parameters and buffers by name.
    """
    model, recording, modules = options.model, options.recording, options.modules
    weights = dict(given)
    casts = AutocastCasts(options.caches_casts)
    constants = Constants() if options.target is not None else None
    mode = TraceMode(modules, recording.reads, casts, constants)
    kept = model_preserved(model) if recording.preserved is None else recording.preserved.checkpoint()
    results = Results(options.replay, (*tensors, *given.values()))
    with (
        kept,
        contents_preserved(recording.written),  # a trace writes for real into tensors that it does not know of
        opaque_traced.tracing(model, recording.calls),
        units.tracing(lambda: casts.num_clears),
        modules.following(),
        casts.counting(),
        mode,
        _state_placed(options, tensors, given),
    ):
        check_traced(recording.host.key.libraries)
        with answered(
            recording.host.key.tensors, _traced_tensors(options, tensors, given), recording.seen_by_line, lambda: str(modules)
        ):
            out, written, arguments = run_call(model, options.call, tensors, weights)
        returned = returned_state(out, model, recording.host, recording.preserved, arguments)
        reassigned = reassigned_buffers(given, weights)
        leaves, names, out_spec = flatten_output(out)
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, torch.Tensor):
                check_constant(leaf, name)
        starts = loss_leaves(out, leaves, options.loss)
        strides = [usual_strides(leaf) for leaf in starts] if options.gradients is None else options.gradients
        outputs = add_outputs(results, leaves, names, dict(zip(map(id, starts), strides, strict=True)), tensors)
        host = recording.host if recording.reads is not None else replace(recording.host, effects=written)
        held = held_containers(model, host, recording.preserved)
        left, effects = add_left(results, model, host, tensors, given, reassigned, written, arguments, held)
    reads = tuple(read for _, read in mode.read)
    later = arguments.written_since(written)
    outputs, left = results.marked(outputs), results.marked(left)
    found = TracedForward(outputs, out_spec, returned, len(results.tensors), reads, left, effects, later)
    return found, (*results.tensors, *(tensor.detach() for tensor, _ in mode.read))


def _traced_tensors(
    options: TraceOptions, tensors: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> Callable[[TensorPlace], Any]:
    """A function that finds the traced tensor at a place; for one in Python state that kernels do not read, the real one."""
    state = {path: tensors[len(options.call.tensors) + i] for i, path in enumerate(options.recording.host.state)}

    def at(place: TensorPlace) -> Any:
        if place.kind == "state":
            return state[place.key] if place.key in state else place.key.get(options.model)
        return tensors[place.key] if place.kind == "input" else weights[place.key]

    return at


@contextmanager
def _state_placed(
    options: TraceOptions, tensors: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Put traced tensors where Python state holds tensors, and other values where the recorded call found them.

    At exit the traced ones that are still there are taken back, wherever that is.
    """
    host, model, state = options.recording.host, options.model, tensors[len(options.call.tensors) :]
    for path, found in (*host.found, *zip(host.counts.places, host.counts.captured, strict=True)):
        path.set(model, rebuilt(found, lambda leaf: leaf))
    placed = [
        *zip(host.state, state, strict=True),
        *((path, state[number]) for path, number in host.shared),
        *((path, weights[name]) for path, name in host.aliases),
        *((path, tensors[i]) for path, i in host.key.inputs_at if i is not None),
    ]
    before = [path.get(model) for path, _ in placed]
    for path, traced in placed:
        path.replace(model, traced)
    try:
        yield
    finally:
        for (path, traced), own in zip(placed, before, strict=True):
            if path.get(model) is traced:
                path.replace(model, own)
