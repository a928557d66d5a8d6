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
            out = called(module, batch)
        leaves = _places(module, out)  # which the loop holds, too, until the backward is done
        _Start.apply(list(layouts.values()), *(leaves[i] for i in layouts)).backward(torch.empty(0))

    seed_all(SEED)
    with _around(setup, module):
        return logical_peak(step, torch.device("cpu"))


def called(module: nn.Module, batch: Any) -> Any:
    """The output for a batch, whose own lists and dictionaries the model does not get: it may write into them."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf, (batch.args, dict(batch.kwargs)))
    return module(*args, **kwargs)


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


def _places(module: nn.Module, out: Any) -> dict[int | tuple[str, str], torch.Tensor]:
    """What a loss can be made of: tensors among the output's leaves, by position, and those left on modules, by their names."""
    found: dict[Any, Any] = dict(enumerate(pytree.tree_leaves(out)))
    for path, part in getattr(module, "original", module).named_modules():
        found |= {(path, name): held for name, held in vars(part).items() if getattr(held, "grad_fn", None) is not None}
    return {place: held for place, held in found.items() if isinstance(held, torch.Tensor) and held.requires_grad}


def _gradients_of_outputs(setup: Setup, module: nn.Module, batch: Any, precision: str) -> dict[Any, torch.Tensor]:
    """Per place, the gradient that the loss itself hands to the tensor there: not what comes through another place."""
    arrived: dict[Any, torch.Tensor] = {}
    with cast(precision):
        out = called(module, batch)
        seen: dict[int, torch.Tensor] = {}  # by identity: what is returned and left, too, gets one gradient
        for place, tensor in _places(module, out).items():
            if id(tensor) not in seen:
                seen[id(tensor)] = _Seen.apply(tensor, place, arrived)
            if isinstance(place, tuple):
                vars(getattr(module, "original", module).get_submodule(place[0]))[place[1]] = seen[id(tensor)]
        out = pytree.tree_map(lambda leaf: seen.get(id(leaf), leaf), out)
        if setup.forward is None:
            loss = setup.loss(module, out, batch.target)
        else:
            loss = sum(leaf.sum() for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
    loss.backward()
    return arrived


class _Seen(torch.autograd.Function):
    """Identity that notes the gradient which comes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, place: Any, arrived: dict[Any, torch.Tensor]) -> torch.Tensor:
        ctx.place, ctx.arrived = place, arrived
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.arrived[ctx.place] = gradient.detach()
        return gradient, None, None


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
