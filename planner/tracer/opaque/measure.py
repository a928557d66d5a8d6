"""What an opaque module's two kernels cost: run on the recorded arguments, with gradients like those of the traced step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from planner.errors import BackwardError, CaptureError, OpaqueModuleError, first_line
from planner.graph.outer import UnitCall
from planner.kernels import custom
from planner.log import TRACER
from planner.profiler.marks import Mark, marked_sections
from planner.profiler.profile import KernelCost
from planner.tracer.host.generators import Generators
from planner.tracer.host.preserve import Preserved, model_preserved
from planner.tracer.joint import Joint
from planner.tracer.opaque.call import OpaqueCall, TensorSpec
from planner.tracer.opaque.module import OpaqueModule
from planner.tracer.opaque.resample import resampled
from planner.tracer.storage import Storages

_LONG_NS = 500_000_000
"""A module that takes this long is timed once."""
FIRST_DRAWS, _FIRST_RANDOM_DRAWS = 3, 5
"""Measurements, each with other data and other random numbers; they are all if they agree. Of a module that draws random
numbers some more: a layer that is dropped in one call of ten seldom shows so soon."""
MOST_DRAWS = 12
"""Measurements of a module of which those do not agree."""
_SPREADS = 3
"""Standard deviations of the measured bytes by which other data may need more than the most that was measured.

If bytes are normally distributed over batches, and over the batches drawn from one batch, 0.7 % of other batches exceed this
bound of twelve measurements, and 15 % the most of these (simulated 60,000 times).
"""


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


def as_it_was(module: nn.Module, weights: Collection[str] | None = None) -> AbstractContextManager[Preserved]:
    """At exit, restore what running the module may change.

    Args:
        weights: names of the parameters that it writes into; None where they are not known: all are kept.
    """
    written = [tensor for name, tensor in module.named_parameters() if weights is None or name in weights]
    return model_preserved(module, [*module.buffers(), *written])


def kept_bytes(call: RecordedCall, module: nn.Module, device: torch.device) -> tuple[int, int]:
    """(bytes that the autograd graph of a call holds besides arguments, results and parameters, those of saved tensors)."""
    found = _Run(call, module, device, None).most_bytes()
    return found.handle, found.saved_tensors


def measured_calls(joint: Joint, model: nn.Module, calls: Mapping[str, RecordedCall]) -> dict[str, OpaqueCall]:
    """The calls, by key, with the costs of their kernels in this step. The model is left as it was.

    Raises:
        OpaqueModuleError, BackwardError: a call does something else than when it was recorded.
        CaptureError: what it returns, or gives a gradient to, depends on the data.
    """
    given = incoming_gradients(joint)
    return {
        key: _measured(call, model.get_submodule(call.spec.module), joint.device, given.get(key)) for key, call in calls.items()
    }


def _measured(call: RecordedCall, module: nn.Module, device: torch.device, incoming: IncomingGradients | None) -> OpaqueCall:
    runs = [_Run(call, module, device, incoming)]
    if incoming is not None and incoming.is_callers:
        runs.append(_Run(call, module, device, incoming, is_expanded=True))
    found = [run.most_bytes() for run in runs]
    forward_ns, backward_ns = runs[0].times()
    return replace(
        call.spec,
        forward=KernelCost(forward_ns, max(run.forward for run in found)),
        backward=KernelCost(backward_ns, max(-call.spec.saved_bytes, *(run.backward for run in found))),
    )


class _Bytes(NamedTuple):
    """Of one run: held by the handle, thereof of tensors that autograd saved, workspace of the forward, of the backward."""

    handle: int
    saved_tensors: int
    forward: int
    backward: int


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
        self.state = [state[name] for name in names]

    def most_bytes(self) -> _Bytes:
        """An upper bound from several runs, which differ in random numbers and data; of each kind on its own.

        Each run finds the module as the one before left it, so that a memory that it keeps fills up. Where that fails,
        it runs again from the module as it was. Runs that fail there, too, on made-up data do not count.

        Raises:
            CaptureError: what the module returns, or gives a gradient to, depends on the data: a step would fail on such data.
        """
        found: list[_Bytes] = []
        draw = 0
        while draw < self._num_draws(found):
            with self._as_it_was():
                draw = self._run_from(draw, found)
        return _Bytes(*map(upper_bound, zip(*found, strict=True)))

    def _num_draws(self, found: Sequence[_Bytes]) -> int:
        """How many draws are to be measured, after these measurements."""
        enough = _FIRST_RANDOM_DRAWS if self.call.is_random else FIRST_DRAWS
        if len({*found[1:]}) > 1:
            return MOST_DRAWS
        return enough + (len({*found}) > 1)  # the first run may fill a cache

    def _run_from(self, first: int, found: list[_Bytes]) -> int:
        """Measure draws, one after the other, until one fails; the number of the next draw. `found` is extended."""
        draw = first
        while draw < self._num_draws(found):
            try:
                found.append(self._bytes_of(draw))
            except Exception as error:
                if draw > first:
                    return draw
                self._explain(error, draw)
            draw += 1
        return draw

    def _explain(self, error: Exception, draw: int) -> None:
        """Raise what means that the module cannot be planned; what made-up data can explain is logged."""
        if draw == 0:
            raise error
        if isinstance(error, (OpaqueModuleError, BackwardError)):
            text = f"with other data, drawn from the example's, or other random numbers: {error}"
            raise CaptureError(text, module=self.call.spec.module) from error
        TRACER.debug("%s does not run on other data: %s", self.call.spec.module, first_line(error))

    def _as_it_was(self) -> AbstractContextManager[Preserved]:
        return as_it_was(self.module, self.call.spec.mutates)

    def _bytes_of(self, draw: int) -> _Bytes:
        """Bytes of a run.

        Both kernels run in one trace, because the backward frees what the handle holds as it goes: if less is live at any time
        than the handle and the gradients together, its workspace, the difference, is negative.

        Args:
            draw: of data and random numbers; 0 for those of the call.
        """
        arguments = resampled(self.call.arguments, draw) if draw else self.call.arguments
        own = saved = 0

        def step(mark: Mark) -> None:
            nonlocal own, saved
            with mark(UnitCall(self.call.spec.module), True):
                made = self.opaque.forward([*arguments, *self.state])
            own = sum(tensor.untyped_storage().nbytes() for tensor in made[:-1])
            saved = made[-1].saved_bytes
            run = self._backward(arguments, made)
            with mark(UnitCall(self.call.spec.module), False):
                grads = run()
            del grads

        if draw:
            Generators(self.device).seed(draw)
        _, forward, between, backward, _ = marked_sections(step, self.device)
        gradients = sum(_storage_bytes(spec) for spec in self.call.spec.gradients if spec is not None)
        alive, peak = between.start_bytes - forward.start_bytes, forward.peak_bytes - forward.start_bytes
        return _Bytes(alive - own, saved, peak - alive, backward.peak_bytes - backward.start_bytes - gradients)

    def times(self) -> tuple[int, int]:
        """Nanoseconds of the forward and of the backward: the least of three runs."""
        best = [_LONG_NS * 1000] * 2
        for _ in range(3):
            with self._as_it_was():
                start = self._now()
                made = self.opaque.forward([*self.call.arguments, *self.state])
                middle = self._now()
                run = self._backward(self.call.arguments, made)
                ready = self._now()
                run()
                end = self._now()
            best = [min(best[0], middle - start), min(best[1], end - ready)]
            if end - start > _LONG_NS:
                break
        return best[0], best[1]

    def _backward(self, arguments: Sequence[torch.Tensor], made: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        """The backward of a forward of these arguments that returned `made`."""
        spec, incoming = self.call.spec, self.incoming
        if incoming is None:
            return list
        read = [arguments[i] for i in spec.reads[0]] + [made[i] for i in spec.reads[1]]
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


def upper_bound(measured: Sequence[int]) -> int:
    """Bytes that another run is unlikely to exceed; the most, if several runs agree that there is no more."""
    most = max(measured)
    return most if measured.count(most) > 1 else most + math.ceil(_SPREADS * statistics.pstdev(measured))


def _storage_bytes(spec: TensorSpec) -> int:
    return spec.empty(torch.device("meta")).untyped_storage().nbytes()
