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
    tickets: tuple[int, ...] = ()


@dataclass(slots=True)
class Run:
    """One call: hands the inputs to the forward and what is alive from stage to stage of the backward."""

    program: Program
    inputs: list[torch.Tensor]
    alive: list[torch.Tensor] = field(default_factory=list)


def run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs of the forward on `inputs`, wired for backward."""
    this = Run(program, list(inputs))
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
        check_backward(tangents, program.tangents, program.describe, program.device)
        held = release_saved(ctx)
        checked, alive = held[: ctx.num_checked], held[ctx.num_checked :]
        for i, ticket in zip(program.tickets, reversed(ctx.tickets), strict=False):
            alive.insert(i, ticket)
        if not keeps_graph():
            ctx.tickets = []
        unchecked = ctx.unchecked
        alive += [checked[i] if is_checked else unchecked[i] for is_checked, i in program.saved_inputs]
        alive += [tangent for tangent in (tangents[i] for i in program.tangents) if tangent is not None]
        del held, checked, tangents
        grads = _run_stage(this, 0, alive)
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
        grads = _run_stage(this, ctx.stage, alive)
        return (None, None, torch.empty(0, device=this.program.device) if ctx.has_token else None, *grads)


def _run_stage(this: Run, stage: int, alive: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    program = this.program
    with rng_put_back_on_error(program.device) if program.swaps[stage] else contextlib.nullcontext():
        results = program.stages[stage](alive)
    num_gradients = len(program.owners[stage])
    this.alive = list(results[num_gradients:])
    return results[:num_gradients]


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
