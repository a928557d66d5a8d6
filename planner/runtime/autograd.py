"""The autograd Functions that run a planned step: `_Forward` runs the forward, taps run the backward in stages.

    token <- Tap(last stage's inputs) <- ... <- Tap(first stage's inputs)      forward order
    outputs <- Forward(token)

The backward visits them in reverse: Forward's backward checks what has arrived, each tap runs a stage. Tensors that one passes
to the next travel in the run's list `alive`, which each stage empties. So the gradients of outputs are freed after their last
read: autograd holds what it hands to a node until that node has run, and Forward's, which gets them, runs no stage.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from planner._compat.backward_state import backward_id, keeps_graph, release_saved
from planner._compat.switches import kernel_switches
from planner.errors import BackwardError
from planner.kernels.custom import rng_put_back_on_error
from planner.runtime.backward_checks import (
    WatchedOutput,
    check_inner_outputs,
    check_modes,
    check_shared_outputs,
    check_spare_inputs,
    check_switches,
    check_unreached_inputs,
    check_views,
    check_visited,
    modified_in_place,
    written_activations,
)
from planner.runtime.backward_key import BackwardKey, backward_key
from planner.runtime.executable import Executable, OtherBackward
from planner.runtime.gradient_sums import watch_sums
from planner.runtime.guards.backward import StateAtForward


class BackwardFinder(Protocol):
    """What a run asks its planned module for; see `planner.runtime.other_backwards`."""

    def find(
        self, key: BackwardKey, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...], leaves: tuple[bool, ...]
    ) -> OtherBackward | None:
        """The backward for these gradients, or after writes into saved activations; None: the planned one.

        `leaves`: per gradient of the joint graph, whether it is that of a leaf of autograd.
        """

    def modified(self, read: Iterable[tuple[str, int, torch.Tensor | None]]) -> str:
        """The name of the first tensor whose version has changed; "" if there is none."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class StepRun:
    """State of one forward and its backward, shared by `_Forward` and the taps.

    Attributes:
        inputs: of the forward graph; emptied once it has run.
        backwards: finds backwards for gradients that are not as planned.
        alive: tensors passed from one backward stage to the next.
        summed: the inputs whose gradients are sums, by position.
        state: what the model's own code in the backward reads; None where there is no such code.
        other: runs in the place of the stages, once it is found.
        complete: gradients per later stage, where `other` computed all of them at once; each tap then returns its tuple instead
            of running its stage.
        waits: for its backward; what the forward saved is there.
        backward: the number of the one that runs its stages.
    """

    executable: Executable
    inputs: list[torch.Tensor]
    backwards: BackwardFinder
    state: StateAtForward | None = None
    alive: list[torch.Tensor] = field(default_factory=list)
    summed: dict[int, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    other: OtherBackward | None = None
    complete: list[tuple[torch.Tensor | None, ...]] = field(default_factory=list)
    waits: bool = True
    backward: int = -1


def run(this: StepRun) -> tuple[torch.Tensor, ...]:
    """Results of the forward, with the planned backward attached."""
    executable, inputs = this.executable, list(this.inputs)
    token: torch.Tensor | None = None
    for k in reversed(range(len(executable.owners))):
        token = _Tap.apply(this, k, token, *(inputs[i] for i in executable.owners[k]))
    try:
        return _Forward.apply(this, token)  # type: ignore[no-any-return]
    except BaseException:
        this.waits = False  # it has no backward
        raise


def run_without_backward(executable: Executable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results of the forward alone; nothing is saved for a backward."""
    with torch.no_grad():
        given = [tensor.detach() for tensor in inputs]
        for i in executable.unversioned:
            given[i] = inputs[i].data
        found = list(executable.forward(given)[: executable.num_outputs])
    for i, can in enumerate(executable.differentiable):
        found[i] = found[i].detach().requires_grad_(can)
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, this: StepRun, _token: torch.Tensor) -> tuple[torch.Tensor, ...]:
        executable, inputs = this.executable, this.inputs
        ctx.run = this
        ctx.switches = kernel_switches() if executable.recomputes else None
        checked = [inputs[i] for i in executable.checked_inputs]
        ctx.unchecked = [inputs[i] for i in executable.unchecked_inputs]
        ctx.num_checked = len(checked)
        ctx.versions = [tensor._version for tensor in checked]
        spare = [inputs[i] for i in executable.spare]
        ctx.given = {i: weakref.ref(inputs[i]) for i in executable.call_inputs}
        this.summed = {i: weakref.ref(inputs[i]) for i in executable.summed}
        this.inputs = []
        for i in executable.unversioned:
            inputs[i] = inputs[i].data  # a tensor with a version of its own
        results = executable.forward(inputs)
        outputs = tuple(
            out.data if alone and out._is_view() else out.detach() if aliased else out
            for out, aliased, alone in zip(results[: executable.num_outputs], executable.aliased, executable.alone, strict=True)
        )
        saved = list(results[executable.num_outputs :])
        ctx.kept_on_ctx = {i: saved.pop(i) for i in reversed(executable.kept_on_ctx)}
        for i in executable.exposed:  # the output itself on ctx would be a cycle: output -> grad_fn -> ctx
            ctx.kept_on_ctx[i] = ctx.kept_on_ctx[i].detach()
        ctx.spare = spare
        # detach() shares the output's version counter; other tensors in its storage, such as `out.data`, have their own
        ctx.version_checked = [outputs[i].detach() for i, _ in executable.version_checked]
        ctx.checked_versions = [tensor._version for tensor in ctx.version_checked]
        ctx.views = [WatchedOutput.of(i, outputs[i]) for i in executable.views]
        ctx.shared = [[WatchedOutput.of(i, outputs[i]) for i in group] for group in executable.sharing]
        ctx.inner = {i: weakref.ref(outputs[i]) for i in executable.inner}
        ctx.spare_versions = [tensor._version for tensor in spare]
        ctx.save_for_backward(*checked, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out, can in zip(outputs, executable.differentiable, strict=True) if not can))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        this: StepRun = ctx.run
        executable = this.executable
        check_modes(executable.device)
        check_switches(ctx.switches)
        if this.state is not None:
            this.state.check()
        check_inner_outputs(ctx.inner, executable.names, gradients)
        check_views(ctx, executable, gradients)
        check_shared_outputs(ctx, executable, gradients)
        key = backward_key(gradients)
        written = written_activations(ctx, executable)
        other = None if key == executable.key and not written else _find(ctx, this, key, gradients, written)
        if other is not None:
            check_unreached_inputs(ctx, executable, other)
            check_spare_inputs(ctx, executable, other)
        held = _saved(ctx, executable, this.backwards)
        checked, alive = held[: ctx.num_checked], held[ctx.num_checked :]
        for i in executable.kept_on_ctx:
            alive.insert(i, ctx.kept_on_ctx[i])
        unchecked = ctx.unchecked
        alive += [checked[i] if is_checked else unchecked[i] for is_checked, i in executable.saved_inputs]
        if other is not None:
            alive += ctx.spare
            alive = [alive[i] for i in other.takes]
        if not keeps_graph():
            ctx.kept_on_ctx, ctx.version_checked, ctx.spare = {}, [], []
            this.waits = False
        taken = executable.output_gradients if other is None else other.output_gradients
        alive += [gradient for gradient in (gradients[i] for i in taken) if gradient is not None]
        this.alive, this.other, this.complete, this.backward = alive, other, [], backward_id()
        return None, torch.empty(0, device=executable.device)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, this: StepRun, stage: int, token: torch.Tensor | None, *_owned: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.stage, ctx.has_token = this, stage, token is not None
        return torch.empty(0, device=this.executable.device)

    @staticmethod
    def backward(ctx: Any, _token: torch.Tensor) -> tuple[Any, ...]:
        this: StepRun = ctx.run
        if this.backward != backward_id():
            raise BackwardError(
                "use the original model for this step: a planned step was differentiated again inside of its own backward "
                "(torch.autograd.grad in a hook), and both run the same stages. Gradients that were accumulated so far are "
                "incomplete: clear them"
            )
        other = this.other
        grads = _run_stage(this, ctx.stage) if other is None else _run_other(this, other, ctx.stage)
        check_visited(ctx, this.executable, ctx.stage, grads)
        watch_sums(ctx, this.summed, this.executable, ctx.stage, grads, is_other=other is not None)
        return (None, None, torch.empty(0, device=this.executable.device) if ctx.has_token else None, *grads)


def _find(
    ctx: Any, this: StepRun, key: BackwardKey, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...]
) -> OtherBackward | None:
    leaves: dict[int, bool] = {}
    node = ctx.next_functions[0][0]
    for positions in this.executable.stage_gradients:
        later = node.next_functions[0][0] if node.has_token else None
        edges = [edge for edge, _ in node.next_functions][int(node.has_token) :]
        leaves |= {i: edge is None or hasattr(edge, "variable") for i, edge in zip(positions, edges, strict=True)}
        node = later
    return this.backwards.find(key, gradients, written, tuple(leaves[i] for i in range(this.executable.num_gradients)))


def _saved(ctx: Any, executable: Executable, backwards: BackwardFinder) -> list[torch.Tensor]:
    """What the forward saved with autograd.

    Raises:
        BackwardError: one of these tensors has been modified in place since; names it.
    """
    try:
        return release_saved(ctx)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    given = {i: ref() for i, ref in ctx.given.items()}
    positions = executable.checked_inputs
    read = [(executable.inputs[i], version, given.get(i)) for i, version in zip(positions, ctx.versions, strict=True)]
    name = backwards.modified(read)
    raise BackwardError(modified_in_place(name or f"an output ({', '.join(executable.names)})"))


def _run_stage(this: StepRun, stage: int) -> tuple[torch.Tensor, ...]:
    executable = this.executable
    alive, this.alive = this.alive, []
    with rng_put_back_on_error(executable.device) if executable.swaps[stage] else contextlib.nullcontext():
        results = executable.stages[stage](alive)
    num_gradients = len(executable.owners[stage])
    this.alive = list(results[num_gradients:])
    return results[:num_gradients]


def _run_other(this: StepRun, other: OtherBackward, stage: int) -> tuple[torch.Tensor | None, ...]:
    """Run another backward as a whole in the first stage; returns the gradients of this stage's inputs."""
    executable = this.executable
    if stage == 0:
        alive, this.alive = this.alive, []
        with rng_put_back_on_error(executable.device) if other.swaps else contextlib.nullcontext():
            results = other.run(alive)
        this.complete = [
            tuple(None if (at := other.position(i)) is None else results[at] for i in own) for own in executable.stage_gradients
        ]
    return this.complete.pop(0)
