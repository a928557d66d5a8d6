"""What an opaque module's two kernels cost: run on the recorded arguments, with gradients like those of the traced step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from planner.kernels import custom
from planner.profiler.marks import Mark, marked_sections
from planner.profiler.profile import KernelCost
from planner.tracer.host.preserve import Preserved, model_preserved
from planner.tracer.joint import Joint
from planner.tracer.opaque.call import OpaqueCall, TensorSpec
from planner.tracer.opaque.module import OpaqueModule
from planner.tracer.storage import Storages

_LONG_NS = 500_000_000
"""A module that takes this long is timed once."""
_DRAWS = 5
"""Measurements of a module that draws random numbers, each with another seed; the most bytes count."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call of an opaque module, with what is needed to run it again.

    Attributes:
        spec: what is known of it.
        arguments: one tensor per distinct tensor argument.
        is_random: it draws random numbers.
    """

    spec: OpaqueCall
    arguments: Sequence[torch.Tensor]
    is_random: bool


@dataclass(frozen=True, slots=True)
class IncomingGradients:
    """What the backward of a call is given in a step, as traced.

    Attributes:
        grads: per result, its gradient; None where there is none.
        partial_sums: per gradient that the backward returns, the sum of earlier contributions; None where there is none.
        is_callers: a gradient is that of an output of the model, laid out as the caller likes.
    """

    grads: tuple[TensorSpec | None, ...]
    partial_sums: tuple[TensorSpec | None, ...]
    is_callers: bool


def incoming_gradients(joint: Joint) -> dict[str, IncomingGradients]:
    """What the backwards of a step's opaque calls are given, by the calls' keys."""
    root = Storages(joint.graph).root
    given = {node.name for node in joint.graph.find_nodes(op="placeholder")}
    found: dict[str, IncomingGradients] = {}
    for node in joint.graph.find_nodes(op="call_function", target=custom.opaque_backward):
        key, grads, _, _, partial_sums = node.args
        is_callers = any(isinstance(grad, fx.Node) and root[grad] in given for grad in grads)
        found[str(key)] = IncomingGradients(_specs(grads), _specs(partial_sums), is_callers)
    return found


def _specs(nodes: Sequence[fx.Node | None]) -> tuple[TensorSpec | None, ...]:
    return tuple(None if node is None else TensorSpec.of(node.meta["val"]) for node in nodes)


def written_weights(model: nn.Module) -> list[torch.Tensor]:
    """Parameters that a forward of their module writes into."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [m.weight for m in model.modules() if isinstance(m, kinds) and m.max_norm is not None]


def as_it_was(module: nn.Module) -> AbstractContextManager[Preserved]:
    """At exit, restore what running the module may change."""
    return model_preserved(module, [*module.buffers(), *written_weights(module)])


def handle_bytes(call: RecordedCall, module: nn.Module, device: torch.device) -> int:
    """Bytes that the autograd graph of a call holds besides arguments, results and parameters."""
    run = _Run(call, module, device, None)
    return max(run.bytes_with(seed)[0] for seed in run.seeds)


def measured_calls(joint: Joint, model: nn.Module, calls: Mapping[str, RecordedCall]) -> dict[str, OpaqueCall]:
    """The calls, by key, with the costs of their kernels in this step. The model is left as it was.

    Raises:
        OpaqueModuleError, BackwardError: a call does something else than when it was recorded.
    """
    given = incoming_gradients(joint)
    return {
        key: _measured(call, model.get_submodule(call.spec.module), joint.device, given.get(key)) for key, call in calls.items()
    }


def _measured(call: RecordedCall, module: nn.Module, device: torch.device, incoming: IncomingGradients | None) -> OpaqueCall:
    runs = [_Run(call, module, device, incoming)]
    if incoming is not None and incoming.is_callers:
        runs.append(_Run(call, module, device, incoming, is_expanded=True))
    found = [run.bytes_with(seed) for run in runs for seed in run.seeds]
    _, forward_bytes, backward_bytes = (max(column) for column in zip(*found, strict=True))
    forward_ns, backward_ns = runs[0].times()
    return replace(
        call.spec,
        forward=KernelCost(forward_ns, forward_bytes),
        backward=KernelCost(backward_ns, max(backward_bytes, -call.spec.saved_bytes)),
    )


class _Run:
    """A call's two kernels, run on its arguments.

    Args:
        incoming: None runs the forward alone.
        is_expanded: gradients of results have stride 0, like those of a sum, and kernels have to copy them.
    """

    def __init__(
        self,
        call: RecordedCall,
        module: nn.Module,
        device: torch.device,
        incoming: IncomingGradients | None,
        *,
        is_expanded: bool = False,
    ) -> None:
        self.call, self.module, self.device, self.incoming, self.is_expanded = call, module, device, incoming, is_expanded
        self.opaque = OpaqueModule(module, call.spec)
        state = dict((*module.named_parameters(), *module.named_buffers()))
        names = (*(name for name, _ in call.spec.weights), *call.spec.buffers)
        self.tensors = [*call.arguments, *(state[name] for name in names)]
        self.seeds = range(_DRAWS if call.is_random else 1)  # what is drawn may decide how much is run

    def bytes_with(self, seed: int) -> tuple[int, int, int]:
        """(bytes that the handle holds, workspace of the forward, workspace of the backward), with these random numbers.

        Both kernels run in one trace, because the backward frees what the handle holds as it goes: if less is live at any time
        than the handle and the gradients together, its workspace, the difference, is negative.

        Args:
            seed: 0 leaves the generators as they are.
        """
        own = 0

        def step(mark: Mark) -> None:
            nonlocal own
            with mark(self.call.spec.key, True):
                made = self.opaque.forward(self.tensors)
            own = sum(tensor.untyped_storage().nbytes() for tensor in made[:-1])
            run = self._backward(made)
            with mark(self.call.spec.key, False):
                grads = run()
            del grads

        with as_it_was(self.module):
            if seed:
                torch.manual_seed(seed)
                random.seed(seed)
            _, forward, between, backward, _ = marked_sections(step, self.device)
        gradients = sum(_storage_bytes(spec) for spec in self.call.spec.gradients if spec is not None)
        alive, peak = between.start_bytes - forward.start_bytes, forward.peak_bytes - forward.start_bytes
        return alive - own, peak - alive, backward.peak_bytes - backward.start_bytes - gradients

    def times(self) -> tuple[int, int]:
        """Nanoseconds of the forward and of the backward: the least of three runs."""
        best = [_LONG_NS * 1000] * 2
        for _ in range(3):
            with as_it_was(self.module):
                start = self._now()
                made = self.opaque.forward(self.tensors)
                middle = self._now()
                run = self._backward(made)
                ready = self._now()
                run()
                end = self._now()
            best = [min(best[0], middle - start), min(best[1], end - ready)]
            if end - start > _LONG_NS:
                break
        return best[0], best[1]

    def _backward(self, made: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        """The backward of a forward that returned `made`."""
        spec, incoming = self.call.spec, self.incoming
        if incoming is None:
            return list
        read = [self.call.arguments[i] for i in spec.reads[0]] + [made[i] for i in spec.reads[1]]
        grads = [None if grad is None else self._ones(grad, self.is_expanded) for grad in incoming.grads]
        sums = [None if spec is None else self._ones(spec) for spec in incoming.partial_sums]
        return partial(self.opaque.backward, grads, made[-1], read, sums)

    def _ones(self, spec: TensorSpec, is_expanded: bool = False) -> torch.Tensor:
        if is_expanded:
            return torch.ones((), dtype=spec.dtype, device=self.device).expand(spec.shape)
        tensor = spec.empty(self.device)
        size = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        tensor.as_strided((size,), (1,)).fill_(1)
        return tensor

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif torch.get_num_threads() == 1:
            return time.thread_time_ns()
        return time.perf_counter_ns()


def _storage_bytes(spec: TensorSpec) -> int:
    return spec.empty(torch.device("meta")).untyped_storage().nbytes()
