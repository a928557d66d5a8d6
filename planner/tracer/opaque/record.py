"""A call of an opaque module, run for real: what it takes, returns, saves and draws."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.switches import forward_switches
from planner._compat.tensors import storage_id
from planner.errors import CaptureError, OpaqueModuleError
from planner.kernels import custom
from planner.tracer.call import CallSpec
from planner.tracer.faults import concerns_model
from planner.tracer.host.generators import Generators
from planner.tracer.host.kernels import graph_from_outside
from planner.tracer.host.restorers import same_bits
from planner.tracer.opaque.call import OpaqueCall, TensorSpec
from planner.tracer.opaque.hooks import users_hooks
from planner.tracer.opaque.measure import RecordedCall, as_it_was, kept_bytes
from planner.tracer.opaque.module import detached_argument, run_under_autograd, weight_aliases
from planner.tracer.opaque.saved import SavedHandle, find_reads, foreign_leaves, used_several_times
from planner.tracer.results import leaf_left

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def record_call(
    module: nn.Module,
    name: str,
    key: str,
    args: Any,
    kwargs: Any,
    device: torch.device,
    is_made: Callable[[torch.Tensor], bool],
    run: Callable[[Callable[[], None]], bool],
) -> RecordedCall:
    """Run a call of an opaque module several times, forward and backward. The module is left as it was.

    Args:
        name: the module's qualified name.
        key: of the call.
        is_made: the model's forward has made this tensor; it was not there before.
        run: runs what it is given; whether that changed anything outside of the module.

    Raises:
        CaptureError: it takes, returns or does what no plan can hold.
    """
    recorder = _CallRecorder(module, name, key, args, kwargs, device, is_made)
    has_effects = run(recorder.run)
    spec = replace(recorder.spec, repeatable=recorder.spec.repeatable and not has_effects)
    return RecordedCall(spec, recorder.arguments, recorder.is_random)


class _CallRecorder:
    """One call, run. `spec` is replaced as more becomes known, and is complete after `run`."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        key: str,
        args: Any,
        kwargs: Any,
        device: torch.device,
        is_made: Callable[[torch.Tensor], bool],
    ) -> None:
        self.module, self.device, self._is_made = module, device, is_made
        self.state: dict[str, torch.Tensor] = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        leaves, in_spec = pytree.tree_flatten((args, kwargs))
        tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        distinct = {id(leaves[i]): leaves[i] for i in tensors}
        self.arguments = [tensor.detach() for tensor in distinct.values()]
        template = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        for leaf in template:
            if not isinstance(leaf, _CONSTANTS):
                raise CaptureError(f"{name} runs as it is, but takes a {type(leaf).__qualname__}", module=name)
        try:
            call = CallSpec(in_spec, template, tensors, None)
        except Exception as error:  # PackedSequence checks its contents when it is built
            if not concerns_model(error):
                raise
            kinds = ", ".join(type(arg).__name__ for arg in (*args, *kwargs.values()))
            raise CaptureError(f"{name} runs as it is, but takes arguments no plan can hold: {kinds}", module=name) from error
        self.spec = OpaqueCall(
            key=key,
            module=name,
            call=call,
            places=tuple(list(distinct).index(id(leaves[i])) for i in tensors),
            arguments=tuple(TensorSpec.of(tensor) for tensor in distinct.values()),
            weights=tuple((weight, p.requires_grad) for weight, p in self.state.items()),
            buffers=tuple(buffers),
            outputs=(),
            grad=torch.is_grad_enabled(),
            autocast=(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            switches=forward_switches(),
        )
        self.state |= buffers
        self.is_random = False

    def run(self) -> None:
        """Run the call several times, to learn and to measure what its forward leaves."""
        self._learn()
        recorded = RecordedCall(self.spec, self.arguments, self.is_random)
        kept, of_tensors = kept_bytes(recorded, self.module, self.device)
        self.spec = replace(self.spec, saved_bytes=kept, saved_tensor_bytes=of_tensors)

    def _learn(self) -> None:
        """Run it once and note what it takes, makes, draws and changes."""
        spec = self.spec
        weights = weight_aliases(spec, [self.state[name] for name, _ in spec.weights])
        state = {**self.state, **weights}
        arguments = [
            detached_argument(t, s.requires_grad and spec.grad) for t, s in zip(self.arguments, spec.arguments, strict=True)
        ]
        given = [*arguments, *state.values()]
        versions = [tensor._version for tensor in given]
        contents = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        host = Generators(self.device).host()
        inside = [dict(inner._modules) for inner in self.module.modules()]
        with as_it_was(self.module) as preserved:
            before = _generators(self.device)
            try:
                handle, results, saved = run_under_autograd(
                    self.module, spec, arguments, state, lambda out: self._note_output(out, arguments)
                )
            except OpaqueModuleError as error:
                raise CaptureError(str(error), module=spec.module) from None
            between = _generators(self.device)
            leaves = self._own_leaves(handle)
            slots = [*arguments, *results]
            reads = find_reads(saved, slots)
            del saved
            several_uses = used_several_times(handle)
            found = self._differentiate(handle, results, slots)
            after = _generators(self.device)
            del handle, results, slots
            if _any_held(leaves):
                raise leaf_left("in Python state", spec.module)
            written = [tensor._version != version for tensor, version in zip(given, versions, strict=True)]
            held = dict((*self.module.named_parameters(), *self.module.named_buffers()))
            is_as_it_was = lambda name: held.get(name) is self.state[name] and same_bits(contents[name], held[name])
            changed = [name for name in contents if not is_as_it_was(name)]
            drew_on_host = Generators(self.device).host() != host
            if inside != [dict(inner._modules) for inner in self.module.modules()]:
                raise CaptureError(f"the forward of {spec.module} exchanges its submodules", module=spec.module)
            left_changed = preserved.restore()
        if any(written[: len(arguments)]):
            raise CaptureError(f"{spec.module} runs as it is, but writes into its argument in place", module=spec.module)
        mutates = {name for name, is_written in zip(state, written[len(arguments) :], strict=True) if is_written}
        num_arguments = len(arguments)
        hooked = bool(users_hooks(self.module))
        host_drawn = self.device.type != "cpu" and before[0] != between[0]
        self.is_random = before != between or drew_on_host
        self.spec = replace(
            self.spec,
            reads=(
                tuple(i for i in reads if i < num_arguments),
                tuple(i - num_arguments for i in reads if i >= num_arguments),
            ),
            gradients=self._gradient_specs(found),
            draws=(before != between, between != after),
            mutates=tuple(sorted(mutates | set(changed))),
            several_uses=several_uses,
            own_leaves=len(leaves),
            repeatable=not (mutates or changed or left_changed or drew_on_host or hooked or host_drawn),
        )

    def _own_leaves(self, handle: SavedHandle) -> list[weakref.ref[torch.Tensor]]:
        """Tensors that require grad and that the module itself makes; CaptureError where it did not make one."""
        leaves = foreign_leaves(handle)
        if any(not self._is_made(leaf) for leaf in leaves):
            raise graph_from_outside(self.spec.module)
        return [weakref.ref(leaf) for leaf in leaves]

    def _note_output(self, out: Any, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Note the output's structure; its tensors."""
        leaves, out_spec = pytree.tree_flatten(out)
        name, inputs = self.spec.module, {storage_id(tensor) for tensor in (*arguments, *self.state.values())}
        outputs: list[Any] = []
        results = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    raise CaptureError(f"{name} runs as it is, but returns a {type(leaf).__qualname__}", module=name)
                outputs.append((leaf,))
            elif any(leaf is tensor for tensor in arguments):
                outputs.append(next(i for i, tensor in enumerate(arguments) if leaf is tensor))
            elif storage_id(leaf) in inputs or leaf.layout is not torch.strided:
                raise CaptureError(f"{name} runs as it is, but returns a view of what it was given", module=name)
            elif leaf.is_leaf and leaf.requires_grad:
                raise leaf_left(f"as output {len(outputs)}", name)
            else:
                outputs.append(TensorSpec.of(leaf))
                results.append(leaf)
        self.spec = replace(self.spec, outputs=tuple(outputs), call=replace(self.spec.call, out_spec=out_spec))
        return results

    def _differentiate(self, handle: SavedHandle, results: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> list[Any]:
        """Gradients per argument and parameter, for ones."""
        handle.slots.given = slots
        roots = [(edge, torch.ones_like(t)) for edge, t in zip(handle.results, results, strict=True) if edge is not None]
        wanted = [edge for edge in handle.sources if edge is not None]
        if not roots or not wanted:
            return [None] * len(handle.sources)
        edges, ones = [edge for edge, _ in roots], [one for _, one in roots]
        found = iter(torch.autograd.grad(edges, wanted, ones, allow_unused=True))  # type: ignore[arg-type]
        return [next(found) if edge is not None else None for edge in handle.sources]

    def _gradient_specs(self, found: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
        """Arguments without a gradient have None; a parameter without one may get one in another call, and has its own spec."""
        specs: list[Any] = []
        for i, grad in enumerate(found):
            number = i - len(self.spec.arguments)
            name, trained = self.spec.weights[number] if number >= 0 else ("", False)
            dense = grad if grad is not None and grad.layout is torch.strided else None
            if dense is None and trained and self.spec.grad:
                dense = self.state[name].detach()
            specs.append(None if dense is None else replace(TensorSpec.of(dense), requires_grad=False))
        return tuple(specs)


def _any_held(tensors: Sequence[weakref.ref[torch.Tensor]]) -> bool:
    """Something of Python's holds one of them, now that its graph is no longer held here; another graph is no matter."""
    if all(tensor() is None for tensor in tensors):
        return False
    gc.collect()
    for reference in tensors:
        tensor = reference()
        if tensor is not None and any(not isinstance(holder, types.FrameType) for holder in gc.get_referrers(tensor)):
            return True
    return False


def _generators(device: torch.device) -> list[bytes]:
    """States of the host's and the device's default generators."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(custom.rng_state(device))
    return [state.numpy().tobytes() for state in states]
