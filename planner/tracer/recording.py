"""Real forwards of the model, run before the trace: they show what a trace cannot know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.fake_tensors import FakeTensor
from planner._compat.module_calls import calls_intercepted
from planner.errors import PlannerError
from planner.tracer.call import CallSpec
from planner.tracer.collectives import CollectivesRefused
from planner.tracer.host.fingerprint import alike
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.kernels import RecordedRead
from planner.tracer.host.observe import NO_ORIGINALS, ObservedForward, Observer
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved, contents_preserved, model_preserved
from planner.tracer.host.state import HostState, LazyValue, bare_fingerprint, remembered
from planner.tracer.host.tensor_reads import SeenByLine
from planner.tracer.model_call import Called, run_call
from planner.tracer.module_stack import ModuleStack
from planner.tracer.opaque.call import OpaqueCall
from planner.tracer.opaque.hooks import refuse_collecting_hooks
from planner.tracer.opaque.measure import RecordedCall, written_weights
from planner.tracer.opaque.record import record_call
from planner.tracer.replay import Replay


@dataclass(frozen=True, slots=True)
class Recording:
    """What real forwards found. Without any (a model without data), everything is empty.

    Attributes:
        host: what Python does beside the kernels.
        calls: calls of opaque modules, by key.
        to_measure: these calls with their arguments.
        reads: (kernel, value) of every host read, in order; None where no forward was run.
        preserved: restores Python state as it was before the first forward; None where no forward was run.
        written: tensors that existed before and that the forwards wrote into, except the model's weights and buffers.
        settled: every place that the forward reads or writes, as a second call leaves it; empty where the first one differs.
        seen_by_line: what tensors showed that the forward made; None where no forward was run.
        moved: as of ObservedForward.
        has_backward_code: code of the model's own runs in the backward.
    """

    host: HostState = field(default_factory=HostState)
    calls: Mapping[str, OpaqueCall] = field(default_factory=dict)
    reads: tuple[RecordedRead, ...] | None = None
    preserved: Preserved | None = None
    written: tuple[torch.Tensor, ...] = ()
    settled: Mapping[Path, Any] = field(default_factory=dict)
    seen_by_line: SeenByLine | None = None
    to_measure: Mapping[str, RecordedCall] = field(default_factory=dict)
    moved: Mapping[int, Path] = field(default_factory=dict)
    has_backward_code: bool = False

    @classmethod
    def of_replay(cls, model: nn.Module, replay: Replay) -> Recording:
        """What was recorded when the call was captured first."""
        reads = None if replay.recorded is None else tuple(replay.recorded)
        return cls(replay.host, dict(replay.calls), reads, remembered(model, replay.host.key))

    def restore(self) -> None:
        """Restore Python state as it was before the first forward."""
        if self.preserved is not None:
            self.preserved.restore()


def has_data(model: nn.Module, tensors: Sequence[torch.Tensor], *, fakes_run: bool) -> bool:
    """A real forward can be run: no tensor is on the meta device.

    Args:
        fakes_run: fake tensors run like real ones; not so where the trace is for a device that is not here.
    """
    without_data = () if fakes_run else FakeTensor
    held = (*model.parameters(), *model.buffers(), *tensors)
    return not any(tensor.is_meta or isinstance(tensor, without_data) for tensor in held)


def record(
    model: nn.Module,
    call: CallSpec,
    tensors: Sequence[torch.Tensor],
    opaque: Sequence[str],
    device: torch.device,
    modules: ModuleStack,
    originals: Mapping[int, torch.Tensor] = NO_ORIGINALS,
    *,
    as_found: bool = False,
) -> Recording:
    """Run the model's forward until two runs do the same; run the calls of opaque modules.

    Nothing is kept for a backward but the arguments of opaque modules, so it needs little more memory than an inference
    forward; an opaque module is run a few times more, with its backward. Python state is left as the last run left it:
    `Recording.restore` restores it.

    Args:
        tensors: one per tensor leaf of the call.
        opaque: names of opaque modules.
        modules: of the model; says after an error where it came from.
        originals: by identity of one of `tensors` that takes the place of one of the user's, that one.
        as_found: see `Observer.observe`.

    Raises:
        CaptureError: the model, or an opaque module, takes, returns or does what no plan can hold.
    """

    def run() -> Called:
        with CollectivesRefused(opaque):
            return run_call(model, call, tensors)

    try:
        observed, calls = _observed(model, run, tensors, opaque, device, modules, originals, as_found)
    except PlannerError:
        raise
    except Exception:
        modules.last_kernel = modules.failed
        raise
    reads = tuple(observed.run.reads)
    specs = {key: recorded.spec for key, recorded in calls.items()}
    state = (observed.preserved, observed.written, observed.settled, observed.seen_by_line)
    return Recording(observed.host, specs, reads, *state, calls, observed.moved, observed.has_backward_code)


def _raises_too(model: nn.Module, call: Callable[[], Any], inputs: Sequence[torch.Tensor], error: Exception) -> bool:
    """Whether the model's forward, run as it is, raises what a recorded forward raised.

    What kernels write into tensors other than buffers and inputs is for the caller to restore.
    """
    with model_preserved(model, [*model.buffers(), *inputs]), iterators_copied(), torch.no_grad():
        try:
            call()
        except Exception as plain:
            return type(plain) is type(error)
    return False


def set_alike(
    model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor], lazy: Sequence[LazyValue], recording: Recording
) -> tuple[LazyValue, ...]:
    """Those of a first call's values that another first call sets alike: no clock, no counter. Runs the model's forward.

    Args:
        model: as a first call finds it; left so.
    """
    if not lazy or recording.preserved is None:
        return ()
    found: list[LazyValue] = []
    kept_nothing = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)

    def run() -> None:
        run_call(model, call, tensors)
        found.extend(v for v in lazy if alike(bare_fingerprint(v.after), bare_fingerprint(v.path.get(model))))

    written = [*model.buffers(), *written_weights(model), *tensors, *recording.written]
    with contents_preserved(written), iterators_copied(), kept_nothing:
        recording.preserved.changed_by(run)
    return tuple(found)


def _observed(
    model: nn.Module,
    call: Callable[[], Called],
    inputs: Sequence[torch.Tensor],
    opaque: Sequence[str],
    device: torch.device,
    modules: ModuleStack,
    originals: Mapping[int, torch.Tensor],
    as_found: bool,
) -> tuple[ObservedForward, dict[str, RecordedCall]]:
    calls: dict[str, RecordedCall] = {}
    counts: dict[str, int] = {}
    described: dict[str, Any] = {}
    observer = Observer(model, modules, opaque, device, [*model.buffers(), *written_weights(model)], originals)

    def has_effects(act: Callable[[], None], module: nn.Module) -> bool:
        return observer.preserved.changed_by(act) or observer.kernels.wrote_outside(module)

    def run_opaque(module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        counts[name] = counts.get(name, 0) + 1
        key = f"{name}#{counts[name] - 1}"
        leaves, spec = pytree.tree_flatten((args, kwargs))
        described_now = observer.kernels.note_call(name, spec, leaves)
        with observer.pause():
            if described.get(key) != described_now:  # a first call may be given None where later ones are given a tensor
                described[key] = described_now
                with observer.tensors.of_stand_ins():
                    calls[key] = record_call(
                        module, name, key, args, kwargs, device, observer.kernels.has_made, lambda act: has_effects(act, module)
                    )
            given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            with observer.kernels.refusing_graphs_from_outside(name, given), observer.tensors.inside_opaque():
                out = run()
            refuse_collecting_hooks(module, name)
            return out

    def run_model() -> Called:
        counts.clear()
        return call()

    try:
        with calls_intercepted({model.get_submodule(name): name for name in opaque}, run_opaque):
            return observer.observe(run_model, inputs, as_found=as_found), calls
    except BaseException as error:
        observer.preserved.restore()
        if isinstance(error, Exception) and not isinstance(error, PlannerError):
            modules.fails_alone = _raises_too(model, call, inputs, error)
            observer.preserved.restore()  # the recorded run met every tensor that this one has written
        raise
    finally:
        observer.kernels.restore_contents(forms=False)
