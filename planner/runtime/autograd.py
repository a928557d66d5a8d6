"""The autograd Functions that run a planned step: one runs the forward, taps return gradients in stages.

    token <- Tap(last stage's inputs) <- ... <- Tap(second stage's inputs)      forward order
    outputs <- Forward(token, first stage's inputs)

Backward visits them the other way round: Forward's backward runs the first stage, each tap the next
one. What is alive between two stages travels in the run's `alive` list, which every stage empties.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from planner._compat.internals import keeps_graph, release_saved
from planner.errors import BackwardError
from planner.kernels.custom import rng_put_back_on_error
from planner.runtime.backward_key import BackwardKey, backward_key

Boxed = Callable[[list[Any]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Program:
    """The compiled step; knows tensors by position only.

    Attributes:
        forward: boxed; all inputs -> outputs, then saved activations.
        stages: boxed; see rewriter/stages.py.
        num_outputs: how many of the forward's results are outputs.
        num_saved: how many are saved activations.
        aliased: per output: it shares its storage with an input or an earlier output; its detached tensor is returned.
        alone: per output: no input and no other output shares its storage. If it is a view, `out.data` is returned, which
            autograd does not treat as a view: it forbids in-place writes into views that a custom Function returns. `watched`
            detects the writes.
        differentiable: per output: eager's output requires grad.
        tangents: positions (among the outputs) whose tangents the backward takes, in its order.
        checked_inputs: positions of inputs the backward reads; a write to one before backward is an error.
        unchecked_inputs: likewise, but written by the forward itself (running statistics).
        saved_inputs: the backward's order of them: (checked?, position among those).
        owners: per stage, positions of the inputs whose gradients it completes, in its results' order.
        describe: per output, its name in errors.
        swaps: per stage: it runs something again under an earlier state of the random generator.
        device: where the step runs.
        stage_gradients: per stage, positions of its gradients among the joint graph's.
        inputs: names of the inputs, for errors.
        call_inputs: positions, among the checked inputs' ones, of tensors of the call, which no module holds.
        key: what the stages are right for.
        apart: positions of the saved activations that are kept on ctx instead of by save_for_backward: saved handles of opaque
            modules, which are not tensors, and the `exposed` ones.
        exposed: those of `apart` that are also outputs and that the backward reads only to recompute. Eager does not save them,
            so the caller may write into them.
        watched: (position of an output, position of the exposed saved activation in its storage) for every output whose storage
            the backward reads; the second is None where that storage is not exposed.
        spare: positions of inputs that the planned backward does not read, but that another backward may need to recompute.
        views: positions of the outputs that are views in eager.
        cast: positions of the trained weights that autocast casts.
    """

    forward: Boxed
    stages: tuple[Boxed, ...]
    num_outputs: int
    num_saved: int
    aliased: tuple[bool, ...]
    alone: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    tangents: tuple[int, ...]
    checked_inputs: tuple[int, ...]
    unchecked_inputs: tuple[int, ...]
    saved_inputs: tuple[tuple[bool, int], ...]
    owners: tuple[tuple[int, ...], ...]
    describe: tuple[str, ...]
    swaps: tuple[bool, ...]
    device: torch.device
    stage_gradients: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    call_inputs: tuple[int, ...]
    key: BackwardKey
    apart: tuple[int, ...] = ()
    exposed: frozenset[int] = frozenset()
    watched: tuple[tuple[int, int | None], ...] = ()
    spare: tuple[int, ...] = ()
    views: tuple[int, ...] = ()
    cast: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OtherBackward:
    """The backward of a program for another key.

    Attributes:
        run: boxed; what it reads of what the forward saved, then gradients of outputs -> gradients.
        takes: positions of the former, among saved activations, then saved inputs, then spare ones.
        tangents: positions (among the outputs) of the latter, in its order.
        gradients: per gradient of the program, in the joint graph's order, its position among the results; None where there
            is none.
        swaps: it runs something again under an earlier state of the random generator.
        peak_bytes: of its step, simulated.
    """

    run: Boxed
    takes: tuple[int, ...]
    tangents: tuple[int, ...]
    gradients: tuple[int | None, ...]
    swaps: bool
    peak_bytes: int


class Others(Protocol):
    """What a program asks its planned module for."""

    def find(
        self, key: BackwardKey, gradients: Sequence[torch.Tensor | None], written: tuple[int, ...]
    ) -> OtherBackward | None:
        """The backward for gradients that are not as planned, or where saved activations were written into."""

    def modified(self, read: Iterable[tuple[str, int, torch.Tensor | None]]) -> str:
        """The name of the first tensor that is no longer of the version it had; "" if there is none."""


@dataclass(slots=True)
class Run:
    """State of one forward and its backward, shared by `_Forward` and the taps.

    Attributes:
        others: finds backwards for gradients that are not as planned.
        alive: tensors passed from one backward stage to the next.
        complete: gradients per later stage, where an OtherBackward computed all of them at once; each tap then returns its
            tuple instead of running its stage.
    """

    program: Program
    inputs: list[torch.Tensor]
    others: Others
    alive: list[torch.Tensor] = field(default_factory=list)
    complete: list[tuple[torch.Tensor | None, ...]] = field(default_factory=list)


def run(program: Program, inputs: Sequence[torch.Tensor], others: Others) -> tuple[torch.Tensor, ...]:
    """Outputs of the forward on `inputs`, wired for backward."""
    this = Run(program, list(inputs), others)
    token: torch.Tensor | None = None
    for k in range(len(program.owners) - 1, 0, -1):
        token = _Tap.apply(this, k, token, *(inputs[i] for i in program.owners[k]))
    return _Forward.apply(this, token, *(inputs[i] for i in program.owners[0]))  # type: ignore[no-any-return]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, this: Run, token: torch.Tensor | None, *_owned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        program, inputs = this.program, this.inputs
        ctx.run, ctx.has_token = this, token is not None
        checked = [inputs[i] for i in program.checked_inputs]
        ctx.unchecked = [inputs[i] for i in program.unchecked_inputs]
        ctx.num_checked = len(checked)
        ctx.versions = [tensor._version for tensor in checked]
        spare = [inputs[i] for i in program.spare]
        ctx.given = {i: weakref.ref(inputs[i]) for i in program.call_inputs}
        this.inputs = []
        results = program.forward(inputs)
        outputs = tuple(
            out.data if alone and out._is_view() else out.detach() if aliased else out
            for out, aliased, alone in zip(results[: program.num_outputs], program.aliased, program.alone, strict=True)
        )
        saved = list(results[program.num_outputs :])
        ctx.apart = {i: saved.pop(i) for i in reversed(program.apart)}
        for i in program.exposed:
            ctx.apart[i] = ctx.apart[i].detach()  # the output itself on ctx would be a cycle: output -> grad_fn -> ctx
        ctx.spare = spare
        # detach() shares the output's version counter; other tensors in its storage, as `out.data`, count for themselves
        ctx.watched = [outputs[i].detach() for i, _ in program.watched]
        ctx.watched_versions = [tensor._version for tensor in ctx.watched]
        ctx.views = [(i, weakref.ref(outputs[i]), outputs[i]._version) for i in program.views]
        ctx.spare_versions = [tensor._version for tensor in spare]
        ctx.save_for_backward(*checked, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out, can in zip(outputs, program.differentiable, strict=True) if not can))
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        this: Run = ctx.run
        program = this.program
        came = [i for i, tangent in enumerate(tangents) if tangent is not None]
        check_backward(tangents, came, program.describe, program.device)
        _check_views(ctx, program, tangents)
        key = backward_key(tangents)
        written = _written(ctx, program)
        other = None if key == program.key and not written else this.others.find(key, tangents, written)
        if other is not None:
            _check_unreached(ctx, program, other)
            _check_spare(ctx, program, other)
        held = _saved(ctx, program, this.others)
        checked, alive = held[: ctx.num_checked], held[ctx.num_checked :]
        for i in program.apart:
            alive.insert(i, ctx.apart[i])
        unchecked = ctx.unchecked
        alive += [checked[i] if is_checked else unchecked[i] for is_checked, i in program.saved_inputs]
        if other is not None:
            alive += ctx.spare
            alive = [alive[i] for i in other.takes]
        if not keeps_graph():
            ctx.apart, ctx.watched, ctx.spare = {}, [], []
        taken = program.tangents if other is None else other.tangents
        alive += [tangent for tangent in (tangents[i] for i in taken) if tangent is not None]
        del held, checked, tangents
        this.complete = []
        grads = _run_stage(this, 0, alive) if other is None else _run_other(this, other, alive)
        token = torch.empty(0, device=program.device) if ctx.has_token else None
        return (None, token, *grads)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, this: Run, stage: int, token: torch.Tensor | None, *_owned: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.stage, ctx.has_token = this, stage, token is not None
        return torch.empty(0, device=this.program.device)

    @staticmethod
    def backward(ctx: Any, _token: torch.Tensor) -> tuple[Any, ...]:
        this: Run = ctx.run
        alive, this.alive = this.alive, []
        grads = this.complete.pop(0) if this.complete else _run_stage(this, ctx.stage, alive)
        return (None, None, torch.empty(0, device=this.program.device) if ctx.has_token else None, *grads)


def _written(ctx: Any, program: Program) -> tuple[int, ...]:
    """Positions of the exposed saved activations that the caller has written into.

    Raises:
        BackwardError: another output was written into, which the backward (and eager's) reads.
    """
    written = []
    for (output, position), tensor, version in zip(program.watched, ctx.watched, ctx.watched_versions, strict=False):
        if tensor._version != version:
            if position is None:
                raise BackwardError(_modified(f"output {program.describe[output]!r}"))
            written.append(position)
    return tuple(written)


def _check_views(ctx: Any, program: Program, tangents: Sequence[torch.Tensor | None]) -> None:
    """Raise BackwardError where eager would take another way to an output that was written into.

    Eager's output is a view there. Autograd makes a view's node anew once it was written into, and a gradient that is not laid
    out as the view then arrives in another layout.
    """
    for i, reference, version in ctx.views:
        output, tangent = reference(), tangents[i]
        if output is None or tangent is None or output._version == version:
            continue
        if tangent.stride() in (output.stride(), torch.empty_like(output).stride()):
            continue
        raise BackwardError(
            f"output {program.describe[i]!r} was modified in place, and its gradient has strides {tuple(tangent.stride())} "
            f"where it has {tuple(output.stride())}: eager would differentiate it in another way than a plan. Write into a "
            "copy of it"
        )


def _check_spare(ctx: Any, program: Program, other: OtherBackward) -> None:
    """Raise BackwardError where another backward reads an input that was modified since."""
    first = program.num_saved + len(program.saved_inputs)
    for i, (tensor, version) in enumerate(zip(ctx.spare, ctx.spare_versions, strict=False)):
        if first + i in other.takes and tensor._version != version:
            raise BackwardError(_modified(program.inputs[program.spare[i]]))


def _modified(what: str) -> str:
    return (
        f"{what} was modified by an inplace operation between a planned forward and its backward, which reads it again. "
        "Modify it after backward, or a copy of it"
    )


def _saved(ctx: Any, program: Program, others: Others) -> list[torch.Tensor]:
    """What the forward saved with autograd.

    Raises:
        BackwardError: one of these tensors was modified in place since; names it.
    """
    try:
        return release_saved(ctx)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    held = {i: ref() for i, ref in ctx.given.items()}
    read = [(program.inputs[i], version, held.get(i)) for i, version in zip(program.checked_inputs, ctx.versions, strict=True)]
    name = others.modified(read)
    what = name or f"an output ({', '.join(program.describe)})"
    raise BackwardError(_modified(what))


def _run_stage(this: Run, stage: int, alive: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    program = this.program
    with rng_put_back_on_error(program.device) if program.swaps[stage] else contextlib.nullcontext():
        results = program.stages[stage](alive)
    num_gradients = len(program.owners[stage])
    this.alive = list(results[num_gradients:])
    return results[:num_gradients]


def _run_other(this: Run, other: OtherBackward, alive: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Run another backward as a whole and return the gradients of the first stage's inputs; the taps return the rest."""
    program = this.program
    with rng_put_back_on_error(program.device) if other.swaps else contextlib.nullcontext():
        results = other.run(alive)
    this.alive = []
    this.complete = [
        tuple(None if (at := other.gradients[i]) is None else results[at] for i in stage) for stage in program.stage_gradients
    ]
    return this.complete.pop(0)


def _check_unreached(ctx: Any, program: Program, other: OtherBackward) -> None:
    """Raise BackwardError where autograd would visibly visit an input that this backward has no gradient for.

    Eager's graph does not contain that input. Here it gets None: a parameter's `grad` stays unchanged, but its tensor hooks
    would run, and so would the backward of the operation that produced an input.
    """
    if None not in other.gradients:
        return
    for owned, gradients in zip(program.owners, program.stage_gradients, strict=True):
        edges = [edge for edge, _ in ctx.next_functions]
        later = edges.pop(0) if ctx.has_token else None
        for position, gradient, edge in zip(owned, gradients, edges, strict=True):
            if other.gradients[gradient] is not None or edge is None:
                continue
            leaf = getattr(edge, "variable", None)
            why = "was computed by an earlier step" if leaf is None else "has a tensor hook" if leaf._backward_hooks else ""
            if why:
                raise BackwardError(
                    f"this backward does not reach {program.inputs[position]}, which {why}: eager would leave it alone, a "
                    "planned module cannot. Use the original model for this step"
                )
        ctx = later


def check_backward(
    tangents: Sequence[torch.Tensor | None], differentiated: Sequence[int], names: Sequence[str], device: torch.device
) -> None:
    """Refuse, before anything is changed, what a planned backward cannot do.

    Args:
        tangents: per output, the gradient that came; None where none did.
        differentiated: positions of the outputs that the plan differentiates.
        names: of the outputs.

    Raises:
        BackwardError: says what to do instead.
    """
    if torch.is_grad_enabled():
        raise BackwardError(
            "a planned module has no second derivative: backward was called with create_graph=True. "
            "Use the original model for this step."
        )
    if torch.is_autocast_enabled(device.type):
        raise BackwardError(
            "backward was called inside autocast, where eager's backward kernels would be cast too; the plan's are not. "
            "Leave the autocast context before calling backward()."
        )
    for i, tangent in enumerate(tangents):
        if tangent is not None and i not in differentiated:
            raise BackwardError(
                f"backward came through output {names[i]!r}, but the plan differentiates only "
                f"{', '.join(names[j] for j in differentiated)}. Plan with loss={names[i]!r}, "
                "or loss=a function of the output that returns all the tensors your loss is made of."
            )
    for i in differentiated:
        if tangents[i] is None:
            raise BackwardError(
                f"no gradient came through output {names[i]!r}, which the plan differentiates. "
                "Plan with loss= naming just the outputs your loss is made of."
            )
