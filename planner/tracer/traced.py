"""The module that is traced: the model's call as a function of flat tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.fake_tensors import FakeTensor, fake_inputs, stand_ins
from planner._compat.joint_export import ExportedJoint, export_joint
from planner._compat.kernels import kernels_replaced
from planner.errors import CaptureError, PlannerError
from planner.graph.source import NOWHERE
from planner.tracer import fidelity, parts, raising
from planner.tracer.casts import Casts
from planner.tracer.collectives import Refusing
from planner.tracer.constants import Constants
from planner.tracer.elsewhere import Elsewhere
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.preserve import Preserved, contents_preserved, keep_deep, keep_reachable, model_preserved
from planner.tracer.host.state import Effect, HostState, Path, Ref, same_build
from planner.tracer.host.values import rebuilt
from planner.tracer.joint import Output
from planner.tracer.loss import Loss, flatten_output, loss_leaves
from planner.tracer.outputs import check_constant, is_cache
from planner.tracer.part import PartCall
from planner.tracer.record import record
from planner.tracer.replay import Replay, Strides, usual_strides, with_strides


class _OutputIdentity(torch.autograd.Function):
    """Identity that makes an output a tensor of its own to the tracer, so that it gets its own tangent."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, strides: Strides | None) -> torch.Tensor:
        ctx.strides = strides
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return with_strides(grad, ctx.strides), None


class Step(nn.Module):
    """The traced module: flat tensors in, flat tensors out, every parameter exactly once (tied ones too).

    Attributes:
        names: unique parameters' and buffers' names in the model, by their names here.
        outputs: one Output per output leaf.
        where: source of the kernel called last, or of the submodule whose forward raised.
        num_results: how many results of the traced function stand for outputs.
        reads: host reads of the last trace; their tensors follow the outputs.
        recorded: values to answer host reads with, once a real forward has been run.
        host: what Python does beside the kernels; the tensors of `host.state` follow the call's as inputs.
        preserved: puts Python state back; None where no recording forward was run.
        left: one Output per tensor that the forward leaves in Python state.
        effects: how they get there.
        parts: names of the submodules that run as they are.
        calls: their calls, as recorded, by key.
        replay: what is known of the call from an earlier capture.
    """

    def __init__(
        self,
        model: nn.Module,
        template: tuple[Any, ...],
        tensors: tuple[int, ...],
        in_spec: Any,
        loss: Loss,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        super().__init__()
        self._elsewhere = elsewhere
        self._hidden = (model,)  # in a tuple, so that it is no submodule and its parameters are not listed twice
        self._template, self._tensors, self._in_spec, self._loss = template, tensors, in_spec, loss
        self._modules_running = fidelity.ModuleStack(model)
        self.names: dict[str, str] = {}
        self.hold_weights()
        self.recorded: list[tuple[str, Any]] | None = None
        self.out_spec: Any = None
        self.outputs: list[Output] = []
        self.num_results = 0
        self.reads: list[fidelity.Read] = []
        self.where = NOWHERE
        self.host = HostState()
        self._reassigned: dict[str, torch.Tensor] = {}
        self.preserved: Preserved | None = None
        self._written: tuple[torch.Tensor, ...] = ()
        self.left: list[Output] = []
        self.effects: list[Effect] = []
        self.parts: Sequence[str] = ()
        self.calls: dict[str, PartCall] = {}
        self.replay: Replay | None = None
        self.device = torch.device("cpu")
        self.caches_casts = torch.is_autocast_cache_enabled()

    def can_run(self, tensors: Sequence[torch.Tensor]) -> bool:
        """There is a forward to learn from, and nothing is known from before.

        Not on the meta device; and fake tensors run like real ones here, but not for a device that is not here.
        """
        absent = FakeTensor if self._elsewhere is not None else ()
        held = (*self.model.parameters(), *self.model.buffers(), *tensors)
        return self.replay is None and not any(t.is_meta or isinstance(t, absent) for t in held)

    @property
    def moving(self) -> frozenset[int]:
        """Positions, behind the call's tensors, of the state that the forward replaces."""
        written = [effect.path for effect in self.effects]
        places = enumerate(self.host.state, start=len(self._tensors))
        return frozenset(i for i, path in places if any(path.is_inside(other) for other in written))

    def hold_weights(self) -> None:
        """Take the model's parameters and buffers, each once, as they are now."""
        self._parameters.clear()
        self._buffers.clear()
        self.names.clear()
        for i, (name, parameter) in enumerate(self.model.named_parameters()):
            self.register_parameter(f"p{i}", parameter)
            self.names[f"p{i}"] = name
        for i, (name, buffer) in enumerate(self.model.named_buffers()):
            self.register_buffer(f"b{i}", buffer)
            self.names[f"b{i}"] = name

    def state_inputs(self) -> list[torch.Tensor]:
        """The tensors of Python state, as leaves."""
        found = [path.get(self.model) for path in self.host.state]
        return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in found]

    def restore(self) -> None:
        """Put Python state back as it was before the recording forwards."""
        if self.preserved is not None:
            self.preserved.restore()

    def export(self, tensors: Sequence[torch.Tensor]) -> ExportedJoint:
        """Trace forward and backward."""
        with parts.known(self.calls), kernels_replaced(raising.stand_ins()):
            if self._elsewhere is None:
                return export_joint(self, fake_inputs(tensors))
            return self._elsewhere.as_there(export_joint(self, self._stand_ins(tensors), self._elsewhere.choices))

    def _stand_ins(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hold tensors without data from now on, and return the inputs as such."""
        held = (*self.named_parameters(), *self.named_buffers())
        made = stand_ins([*(tensor for _, tensor in held), *tensors])
        for (name, _), stand_in in zip(held, made, strict=False):
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(stand_in, stand_in.requires_grad)
            else:
                self._buffers[name] = stand_in
        return made[len(held) :]

    def record(self, tensors: Sequence[torch.Tensor]) -> None:
        """Run a real forward, to learn what Python reads and what the parts do."""

        def run() -> Any:
            with Refusing(self.parts):
                return self.call(tensors)

        try:
            observed, self.calls = record(self.model, run, tensors, self.parts, self.device, self._modules_running)
        except PlannerError:
            raise
        except Exception:
            self.where = self._modules_running.failed
            raise
        self.host, self.preserved, self.recorded = observed.host, observed.preserved, observed.run.reads
        self._written = observed.written

    @property
    def model(self) -> nn.Module:
        """The model being traced."""
        return self._hidden[0]

    def call(self, tensors: Sequence[torch.Tensor], weights: dict[str, torch.Tensor] | None = None) -> Any:
        """The model on the call's leaves with `tensors` in place; tied parameters follow their one name in `weights`."""
        leaves = list(self._template)
        for position, tensor in zip(self._tensors, tensors, strict=False):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        with _given_unchanged(leaves, self._in_spec, (args, kwargs)):
            if weights is None:
                return self.model(*args, **kwargs)
            return torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=True)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The traced function: results, then tensors that Python read."""
        given = {name: getattr(self, here) for here, name in self.names.items()}
        weights = dict(given)
        casts = Casts(self.caches_casts)
        constants = Constants() if self._elsewhere is not None else None
        tracing = fidelity.Tracing(self._modules_running, self.recorded, casts, constants)
        kept = model_preserved(self.model) if self.preserved is None else self.preserved.checkpoint()
        try:
            with (
                kept,
                contents_preserved(self._written),  # a trace writes for real into tensors that it does not know of
                parts.tracing(self.model, self.calls),
                self._modules_running.following(),
                casts.counting(),
                tracing,
            ):
                self._place_state(tensors[len(self._tensors) :], given)
                out = self.call(tensors, weights)
                self._reassigned = _reassigned(given, weights)
                leaves, names, self.out_spec = flatten_output(out)
                for name, leaf in zip(names, leaves, strict=True):
                    if not isinstance(leaf, torch.Tensor):
                        check_constant(leaf, name)
                losses = loss_leaves(out, leaves, self._loss)
                handed = self._classify_outputs(leaves, names, losses, tensors, given)
        finally:
            self.where = tracing.where
        self.reads = [read for _, read in tracing.read]
        read = [tensor.detach() for tensor, _ in tracing.read]
        return (*handed, *read)

    def _place_state(self, tensors: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        """Put traced tensors where Python state holds tensors."""
        for path, traced in zip(self.host.state, tensors, strict=True):
            path.set(self.model, traced)
        for path, name in self.host.aliases:
            path.set(self.model, weights[name])

    def _classify_outputs(
        self,
        leaves: Sequence[Any],
        names: Sequence[str],
        losses: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
        weights: Mapping[str, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Classify the output's leaves as graph results, inputs returned unchanged, or constants.

        Results that backward does not start from are detached.
        """
        starts = {id(leaf) for leaf in losses} if self.replay is None else set()
        self.outputs = []
        results: dict[int, torch.Tensor] = {}  # by identity: a tensor returned twice is one result
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, torch.Tensor):
                left_out = is_cache(leaf)
                self.outputs.append(Output(name, None, constant=None if left_out else leaf, left_out=left_out))
            elif any(leaf is tensor for tensor in tensors):
                position = next(j for j, tensor in enumerate(tensors) if leaf is tensor)
                self.outputs.append(Output(name, None, input=position))
            else:
                position = list(results).index(id(leaf)) if id(leaf) in results else len(results)
                differentiated = self._add_result(results, leaf, id(leaf) in starts)
                self.outputs.append(Output(name, position, differentiated, leaf.requires_grad))
        self._collect_left(tensors, weights, results)
        self.num_results = len(results)
        return list(results.values())

    def _is_of_buffer(self, effect: Effect) -> bool:
        name = f"{effect.path.module}.{effect.path.name}".lstrip(".")
        return not effect.path.steps and effect.path.scope is None and name in self.names.values()

    def _add_result(self, results: dict[int, torch.Tensor], leaf: torch.Tensor, is_start: bool) -> bool:
        """Make a tensor a result, unless it is one; whether backward starts from it."""
        position = list(results).index(id(leaf)) if id(leaf) in results else len(results)
        if self.replay is None:
            differentiated, strides = is_start, usual_strides(leaf)
        else:
            strides = self.replay.strides[position]
            differentiated = strides is not None
        if position == len(results):
            results[id(leaf)] = _OutputIdentity.apply(leaf, strides) if differentiated else leaf.detach()
        return differentiated

    def _collect_left(
        self, tensors: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor], results: dict[int, torch.Tensor]
    ) -> None:
        """Make what the forward left in Python state results, and note how a planned call writes it there."""
        self.left, self.effects = [], []
        sources = {id(tensor): Ref("input", i) for i, tensor in enumerate(tensors)}
        sources |= {id(tensor): Ref("weight", name) for name, tensor in weights.items()}

        def ref(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or type(leaf) in (torch.Tensor, nn.Parameter):
                return leaf
            if id(leaf) not in sources:
                if id(leaf) not in results:
                    # the loop may add it to its loss; if it does not, that backward is captured when it first runs
                    position = len(results)
                    differentiated = self._add_result(results, leaf, leaf.requires_grad)
                    self.left.append(Output(str(path), position, differentiated, leaf.requires_grad))
                sources[id(leaf)] = Ref("result", list(results).index(id(leaf)))
            return sources[id(leaf)]

        for effect in (effect for effect in self.host.effects if not self._is_of_buffer(effect)):
            live = effect.path.get(self.model)
            if effect.appends or effect.replaces:
                live = list(live)[-len(effect.template) :] if effect.template else []
            template = rebuilt(live, partial(ref, effect.path))
            if not same_build(template, effect.template):
                raise CaptureError(
                    f"{effect.path} has another structure after the traced forward than after a real one",
                    module=effect.path.module,
                )
            self.effects.append(replace(effect, template=template))
        for name, new in self._reassigned.items():
            module, _, attribute = name.rpartition(".")
            path = Path(module, attribute)
            self.effects.append(Effect(path, ref(path, new)))


@contextmanager
def _given_unchanged(leaves: Sequence[Any], spec: Any, call: Any) -> Iterator[None]:
    """Put back, at exit, what a forward wrote into the containers, objects and arrays that it was given; tensors are left out.

    Raises:
        CaptureError: it did write.
    """
    kept = Preserved(guards_iterators=False)
    keep_reachable(kept, [item for leaf in leaves if not is_generator(leaf) for item in keep_deep(kept, leaf, {})], {})
    try:
        yield
    finally:
        changed = kept.restore()
    now, spec_now = pytree.tree_flatten(call)
    if changed or spec_now != spec or any(one is not other for one, other in zip(leaves, now, strict=True)):
        raise CaptureError(
            "the model's forward writes into a list, dictionary, array or object that it is given as an argument, which a plan "
            "would leave as it is. Let it write into a copy: dict(argument), list(argument), copy.copy(argument)"
        )


def _reassigned(given: dict[str, torch.Tensor], left: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `self.buffer = new` in the model's forward has put in place of buffers.

    functional_call leaves in its dictionary what the module held at the end of the forward.

    Raises:
        CaptureError: a parameter was replaced, or a buffer by a tensor of another shape or dtype.
    """
    found = {name: left[name] for name, tensor in given.items() if left[name] is not tensor}
    for name, new in found.items():
        tensor = given[name]
        if isinstance(tensor, nn.Parameter) or new.shape != tensor.shape or new.dtype != tensor.dtype:
            raise CaptureError(f"the model's forward replaces {name} by another tensor; only in-place updates can be planned")
    return found
