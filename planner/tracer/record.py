"""A real forward of the model, to learn what a trace cannot know: tensor values that Python reads, and opaque parts' calls."""

from __future__ import annotations

import random
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.module_calls import calls_intercepted
from planner._compat.private_names import MODULE_HOOKS
from planner._compat.tensors import storage_id
from planner.errors import CaptureError, InputError
from planner.kernels import custom
from planner.profiler.memory import allocations_of
from planner.profiler.profile import KernelCost
from planner.tracer import fidelity
from planner.tracer.call import CallSpec
from planner.tracer.faults import concerns_model
from planner.tracer.host.generators import Generators
from planner.tracer.host.kernels import graph_from_outside
from planner.tracer.host.observe import Observation, Observer
from planner.tracer.host.preserve import model_preserved
from planner.tracer.host.restorers import same_bits
from planner.tracer.host.scopes import global_names
from planner.tracer.host.values import parts as parts_of
from planner.tracer.part import (
    Part,
    PartCall,
    Ticket,
    call_part,
    find_reads,
    foreign_leaves,
    gated,
    tensor_spec,
    weight_aliases,
)

_LONG_NS = 500_000_000
"""A part that takes this long is timed once."""
_DRAWS = 5
"""A part that draws random numbers is run so often, each time with others; the most bytes seen count."""
_MOST_VALUES = 10_000
"""Values behind hooks that are looked at."""
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


def record(
    model: nn.Module,
    call: Callable[[], Any],
    inputs: Sequence[torch.Tensor],
    parts: Sequence[str],
    device: torch.device,
    modules: fidelity.ModuleStack,
) -> tuple[Observation, dict[str, PartCall]]:
    """Run recording forwards: what Python does beside the custom, and the calls of opaque submodules, by key.

    Nothing is kept for a backward, so it needs no more memory than an inference forward; an opaque submodule is run a few times
    more, with its backward, and measured. Python state is left as the last run left it: `Observation.preserved` puts it back.

    Raises:
        CaptureError: the model, or an opaque submodule, takes, returns or does what no plan can hold.
    """
    calls: dict[str, PartCall] = {}
    counts: dict[str, int] = {}
    observer = Observer(model, modules, parts, device, [*model.buffers(), *written_weights(model)])

    def run_part(module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        counts[name] = counts.get(name, 0) + 1
        key = f"{name}#{counts[name] - 1}"
        with observer.pause():
            if key not in calls:
                recording = _Recording(module, name, key, args, kwargs, device, observer.kernels.has_made)
                effects = observer.preserved.changed_by(recording.run) or observer.kernels.wrote_outside(module)
                calls[key] = replace(recording.spec, repeatable=recording.spec.repeatable and not effects)
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            with observer.kernels.refusing_graphs_from_outside(name, given):
                out = run()
            _refuse_collected(module, name)
            return out

    def run_model() -> Any:
        counts.clear()
        return call()

    try:
        with calls_intercepted({model.get_submodule(name): name for name in parts}, run_part):
            return observer.observe(run_model, inputs), calls
    except BaseException:
        observer.preserved.restore()
        raise
    finally:
        observer.kernels.restore_contents(forms=False)


def _refuse_collected(module: nn.Module, name: str) -> None:
    """Raise InputError where hooks keep tensors that the loop could differentiate: no graph that a plan knows holds them."""
    todo, seen = [hook for hook in _hooks(module) if fidelity.is_foreign(hook)], set[int]()
    while todo and len(seen) < _MOST_VALUES:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            raise InputError(
                f"a forward hook on {name} keeps a tensor {list(value.shape)} that requires grad, for a loss of the loop; "
                "a plan knows no gradient that arrives there. Return it from the model, or keep it detached in the hook"
            )
        todo += [item for _, item in parts_of(value, lambda _, __: True)]
        if isinstance(value, types.FunctionType):
            todo += [value.__globals__[variable] for variable in global_names(value.__code__) if variable in value.__globals__]


def written_weights(model: nn.Module) -> list[torch.Tensor]:
    """Parameters that a forward of their module writes into."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [m.weight for m in model.modules() if isinstance(m, kinds) and m.max_norm is not None]


class _Recording:
    """One call of a part, run and measured; `spec` is what came out. The module is left as it was."""

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
        """`is_made`: a tensor is made by the forward, and was not there before."""
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
        except Exception as error:  # a packed sequence looks into what it is made of
            if not concerns_model(error):
                raise
            kinds = ", ".join(type(arg).__name__ for arg in (*args, *kwargs.values()))
            raise CaptureError(f"{name} runs as it is, but takes arguments no plan can hold: {kinds}", module=name) from error
        self.spec = PartCall(
            key=key,
            module=name,
            call=call,
            places=tuple(list(distinct).index(id(leaves[i])) for i in tensors),
            arguments=tuple(tensor_spec(tensor) for tensor in distinct.values()),
            weights=tuple((weight, p.requires_grad) for weight, p in self.state.items()),
            buffers=tuple(buffers),
            outputs=(),
            grad=torch.is_grad_enabled(),
            autocast=(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )
        self.state |= buffers
        self.is_random = False

    def run(self) -> None:
        """Run the part several times, to learn and to measure."""
        self._learn()
        self._measure()

    def _untouched(self) -> Any:
        return model_preserved(self.module, [*self.module.buffers(), *written_weights(self.module)])

    def _learn(self) -> None:
        """Run it once and see what it takes, makes, draws and changes."""
        spec = self.spec
        weights = weight_aliases(spec, [self.state[name] for name, _ in spec.weights])
        state = {**self.state, **weights}
        arguments = [gated(t, s.requires_grad and spec.grad) for t, s in zip(self.arguments, spec.arguments, strict=True)]
        watched = [*arguments, *state.values()]
        versions = [tensor._version for tensor in watched]
        contents = {name: tensor.detach().clone() for name, tensor in self.state.items() if name in spec.buffers}
        host = Generators(self.device).host()
        inside = [dict(inner._modules) for inner in self.module.modules()]
        with self._untouched() as preserved:
            before = _generators(self.device)
            ticket, results, packed = call_part(self.module, spec, arguments, state, lambda out: self._see(out, arguments))
            between = _generators(self.device)
            leaves = foreign_leaves(ticket)
            slots = [*arguments, *results]
            reads = find_reads(packed, slots)
            del packed
            found = self._differentiate(ticket, results, slots)
            after = _generators(self.device)
            written = [tensor._version != version for tensor, version in zip(watched, versions, strict=True)]
            held = dict(self.module.named_buffers())
            is_as_it_was = lambda name: held.get(name) is self.state[name] and same_bits(contents[name], held[name])
            changed = [name for name in contents if not is_as_it_was(name)]
            drew_on_host = Generators(self.device).host() != host
            if inside != [dict(inner._modules) for inner in self.module.modules()]:
                raise CaptureError(f"the forward of {spec.module} exchanges its submodules", module=spec.module)
            left_changed = preserved.restore()
        if any(written[: len(arguments)]):
            raise CaptureError(f"{spec.module} runs as it is, but writes into its argument in place", module=spec.module)
        if any(not self._is_made(leaf) for leaf in leaves):
            raise graph_from_outside(spec.module)
        mutates = {name for name, is_written in zip(state, written[len(arguments) :], strict=True) if is_written}
        num_arguments = len(arguments)
        hooked = any(map(fidelity.is_foreign, _hooks(self.module)))
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
            own_leaves=len(leaves),
            repeatable=not (mutates or changed or left_changed or drew_on_host or hooked or host_drawn),
        )

    def _see(self, out: Any, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Note the output's structure; its tensors."""
        leaves, out_spec = pytree.tree_flatten(out)
        name, taken = self.spec.module, {storage_id(tensor) for tensor in (*arguments, *self.state.values())}
        outputs: list[Any] = []
        results = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    raise CaptureError(f"{name} runs as it is, but returns a {type(leaf).__qualname__}", module=name)
                outputs.append((leaf,))
            elif any(leaf is tensor for tensor in arguments):
                outputs.append(next(i for i, tensor in enumerate(arguments) if leaf is tensor))
            elif storage_id(leaf) in taken or leaf.layout is not torch.strided:
                raise CaptureError(f"{name} runs as it is, but returns a view of what it was given", module=name)
            else:
                outputs.append(tensor_spec(leaf))
                results.append(leaf)
        self.spec = replace(self.spec, outputs=tuple(outputs), call=replace(self.spec.call, out_spec=out_spec))
        return results

    def _differentiate(self, ticket: Ticket, results: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> list[Any]:
        """Gradients per argument and parameter, for ones."""
        ticket.slots.given = slots
        roots = [(edge, torch.ones_like(t)) for edge, t in zip(ticket.results, results, strict=True) if edge is not None]
        wanted = [edge for edge in ticket.sources if edge is not None]
        if not roots or not wanted:
            return [None] * len(ticket.sources)
        edges, ones = [edge for edge, _ in roots], [one for _, one in roots]
        found = iter(torch.autograd.grad(edges, wanted, ones, allow_unused=True))  # type: ignore[arg-type]
        return [next(found) if edge is not None else None for edge in ticket.sources]

    def _gradient_specs(self, found: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
        """Arguments that nothing reached get none; a parameter may get one in another call."""
        specs: list[Any] = []
        for i, grad in enumerate(found):
            number = i - len(self.spec.arguments)
            name, trained = self.spec.weights[number] if number >= 0 else ("", False)
            dense = grad if grad is not None and grad.layout is torch.strided else None
            if dense is None and trained and self.spec.grad:
                dense = self.state[name].detach()
            specs.append(None if dense is None else replace(tensor_spec(dense), requires_grad=False))
        return tuple(specs)

    def _measure(self) -> None:
        """Time and bytes of both custom, as a planned step will run them."""
        part = Part(self.module, self.spec)
        tensors = [*self.arguments, *self.state.values()]
        kept = forward_bytes = backward_bytes = 0
        for seed in range(_DRAWS if self.is_random else 1):  # what is drawn may decide how much is run
            with self._untouched():
                if seed:
                    torch.manual_seed(seed)
                    random.seed(seed)
                made, alive, peak = allocations_of(lambda: part.forward(tensors), self.device)
                own = sum(tensor.untyped_storage().nbytes() for tensor in made[:-1])
                kept = max(kept, alive - own)
                forward_bytes = max(forward_bytes, peak - alive)
                del made
                backward_bytes = max(backward_bytes, *(self._workspace_of_backward(part, tensors, e) for e in (False, True)))
        best = [_LONG_NS * 1000] * 2
        for _ in range(3):
            with self._untouched():
                start = self._now()
                made = part.forward(tensors)
                middle = self._now()
                run = self._backward_of(part, made)
                ready = self._now()
                run()
                end = self._now()
            best = [min(best[0], middle - start), min(best[1], end - ready)]
            if end - start > _LONG_NS:
                break
        self.spec = replace(
            self.spec,
            ticket_bytes=kept,
            forward=KernelCost(best[0], forward_bytes),
            backward=KernelCost(best[1], backward_bytes),
        )

    def _workspace_of_backward(self, part: Part, tensors: Sequence[torch.Tensor], expanded: bool) -> int:
        run = self._backward_of(part, part.forward(tensors), expanded)
        grads, _, peak = allocations_of(run, self.device)
        return max(0, peak - sum(grad.nbytes for grad in grads if grad is not None and grad.layout is torch.strided))

    def _backward_of(self, part: Part, made: Sequence[Any], expanded: bool = False) -> Callable[[], Sequence[Any]]:
        """`expanded`: tangents of a layout that a kernel has to copy, as those of a sum have."""
        spec, ticket = self.spec, made[-1]
        reads = [self.arguments[i] for i in spec.reads[0]] + [made[i] for i in spec.reads[1]]
        ones = [torch.ones_like(t) if edge is not None else None for t, edge in zip(made[:-1], ticket.results, strict=True)]
        if expanded:
            ones = [None if one is None else one.new_ones(()).expand(one.shape) for one in ones]
        if not spec.taken or all(one is None for one in ones):
            return list
        return lambda: part.backward(ones, ticket, reads, [None] * len(spec.taken))

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif torch.get_num_threads() == 1:
            return time.thread_time_ns()
        return time.perf_counter_ns()


def _generators(device: torch.device) -> list[bytes]:
    """States of the host's and the device's default generators."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(custom.rng_state(device))
    return [state.numpy().tobytes() for state in states]


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for m in module.modules() for kind in MODULE_HOOKS for hook in vars(m)[kind].values()]
