"""Measured peak of a step, with the gradients of its outputs laid out as the model's own loss lays them out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.field.case import Setup, seed_all
from benchmarks.field.loop import SEED, cast
from planner.profiler.memory import logical_peak


def step_peak(setup: Setup, module: nn.Module, precision: str) -> int:
    """The most bytes that forward and backward of the first batch have allocated at once, above what was live before.

    The loss itself is the loop's. Its gradients are made anew in the backward, and nobody but the backward holds them.
    """
    batch = copy.deepcopy(setup.batches[0])
    seed_all(SEED)
    with _around(setup, module):
        layouts = _gradients_of_outputs(setup, module, batch, precision)  # and what a first call allocates for good

    def step() -> None:
        with cast(precision):
            out = module(*batch.args, **batch.kwargs)
        leaves = pytree.tree_leaves(out)  # which the loop holds, too, until the backward is done
        _Start.apply(list(layouts.values()), *(leaves[i] for i in layouts)).backward(torch.empty(0))

    seed_all(SEED)
    with _around(setup, module):
        return logical_peak(step, torch.device("cpu"))


@contextmanager
def _around(setup: Setup, module: nn.Module) -> Iterator[None]:
    """What the loop does around a step."""
    if setup.before_step is not None:
        setup.before_step(module, 0)
    yield
    module.zero_grad(set_to_none=True)
    if setup.after_step is not None:
        setup.after_step(module, 0)


def resident_bytes(planned: Any) -> int:
    """What is there before the planned step: parameters, buffers, inputs and constants of its graph."""
    graph = planned.plan.graph
    return sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind.name != "TANGENT")


def _gradients_of_outputs(setup: Setup, module: nn.Module, batch: Any, precision: str) -> dict[int, torch.Tensor]:
    """Per position among the output's leaves, the gradient that reaches it from the loss."""
    arrived: dict[int, torch.Tensor] = {}

    def hook(position: int) -> Any:
        def arrives(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                arrived[position] = gradient.detach()

        return arrives

    with cast(precision):
        out = module(*batch.args, **batch.kwargs)
        for i, leaf in enumerate(pytree.tree_leaves(out)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(hook(i))
        if setup.forward is None:
            loss = setup.loss(module, out, batch.target)
        else:
            loss = sum(leaf.sum() for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
    loss.backward()
    return arrived


class _Start(torch.autograd.Function):
    """Starts a backward with given gradients, without a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *(_again(gradient) for gradient in ctx.gradients)


def _again(gradient: torch.Tensor) -> torch.Tensor:
    """A new tensor of the same content and layout, in memory of its own and no more than it spans."""
    if gradient.numel() == 0:
        return gradient.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(gradient.shape, gradient.stride(), strict=True))
    memory = gradient.as_strided((span,), (1,), gradient.storage_offset()).clone()
    return memory.as_strided(gradient.shape, gradient.stride(), 0)
