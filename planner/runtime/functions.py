"""The autograd Functions that run a planned step: one runs the forward, taps hand out gradients in stages.

    token <- Tap(last stage's inputs) <- ... <- Tap(second stage's inputs)      forward order
    outputs <- Forward(token, first stage's inputs)

Backward visits them the other way round: Forward's backward runs the first stage, each tap the next
one. What is alive between two stages travels in the run's `alive` list, which every stage empties.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from planner._torch import keeps_graph, release_saved
from planner.errors import BackwardError
from planner.runtime.backward_key import BackwardKey, backward_key
from planner.tracer.kernels import rng_put_back_on_error

Boxed = Callable[[list[Any]], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Program:
    """The compiled step; knows tensors by position only.

    Attributes:
        forward: boxed; all inputs -> outputs, then saved activations.
        stages: boxed; see rewriter/stages.py.
        num_outputs: how many of the forward's results are outputs.
        aliased: per output: it shares its storage with an input or another output, and is handed out as a tensor of its own.
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
        key: what the stages are right for.
        tickets: positions, among the saved activations, of opaque parts' tickets, which are no tensors.
    """

    forward: Boxed
    stages: tuple[Boxed, ...]
    num_outputs: int
    aliased: tuple[bool, ...]
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
    key: BackwardKey
    tickets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OtherBackward:
    """The backward of a program for another key.

    Attributes:
        run: boxed; what it reads of what the forward saved, then gradients of outputs -> gradients.
        takes: positions of the former, among saved activations and then saved inputs.
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


FindBackward = Callable[[BackwardKey, Sequence[torch.Tensor | None]], OtherBackward | None]


@dataclass(slots=True)
class Run:
    """One call: hands the inputs to the forward and what is alive from stage to stage of the backward.

    Attributes:
        find_backward: the backward for gradients that are not as planned.
        complete: gradients of the later stages, by stage, where another backward has computed them all.
    """

    program: Program
    inputs: list[torch.Tensor]
    find_backward: FindBackward
    alive: list[torch.Tensor] = field(default_factory=list)
    complete: list[tuple[torch.Tensor | None, ...]] = field(default_factory=list)


def run(program: Program, inputs: Sequence[torch.Tensor], find_backward: FindBackward) -> tuple[torch.Tensor, ...]:
    """Outputs of the forward on `inputs`, wired for backward."""
    this = Run(program, list(inputs), find_backward)
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
        this.inputs = []
        results = program.forward(inputs)
        outputs = tuple(
            out.detach() if aliased else out
            for out, aliased in zip(results[: program.num_outputs], program.aliased, strict=True)
        )
        saved = list(results[program.num_outputs :])
        ctx.tickets = [saved.pop(i) for i in reversed(program.tickets)]
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
        key = backward_key(tangents)
        other = None if key == program.key else this.find_backward(key, tangents)
        if other is not None:
            _check_unreached(ctx, program, other)
        held = release_saved(ctx)
        checked, alive = held[: ctx.num_checked], held[ctx.num_checked :]
        for i, ticket in zip(program.tickets, reversed(ctx.tickets), strict=False):
            alive.insert(i, ticket)
        if not keeps_graph():
            ctx.tickets = []
        unchecked = ctx.unchecked
        alive += [checked[i] if is_checked else unchecked[i] for is_checked, i in program.saved_inputs]
        if other is not None:
            alive = [alive[i] for i in other.takes]
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


def _run_stage(this: Run, stage: int, alive: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    program = this.program
    with rng_put_back_on_error(program.device) if program.swaps[stage] else contextlib.nullcontext():
        results = program.stages[stage](alive)
    num_gradients = len(program.owners[stage])
    this.alive = list(results[num_gradients:])
    return results[:num_gradients]


def _run_other(this: Run, other: OtherBackward, alive: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Run another backward as a whole; the gradients of the first stage's inputs. The taps hand out the rest."""
    program = this.program
    with rng_put_back_on_error(program.device) if other.swaps else contextlib.nullcontext():
        results = other.run(alive)
    this.alive = []
    this.complete = [
        tuple(None if (at := other.gradients[i]) is None else results[at] for i in stage) for stage in program.stage_gradients
    ]
    return this.complete.pop(0)


def _check_unreached(ctx: Any, program: Program, other: OtherBackward) -> None:
    """Raise BackwardError where it would show that autograd visits inputs which this backward has no gradient for.

    Eager's graph does not reach them. Here they get None: a parameter's `grad` stays as it is, but its tensor hooks would run,
    and so would the backward of whatever has made an input.
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
                    f"this backward does not reach {program.inputs[position]}, which {why}: eager would leave it alone, a planned "
                    "module cannot. Use the original model for this step, or plan a module that ends where this loss begins."
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
