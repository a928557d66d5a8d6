"""What people do today to train in less memory: each method takes a model, may change it, and returns what to call instead.

Every recompute is non-reentrant and restores the random state, as their manuals recommend.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch._functorch.config as functorch_config  # activation_memory_budget has no public door
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

Forward = Callable[..., Any]
Method = Callable[[nn.Module], Forward]

aten = torch.ops.aten
DEAR_OPS = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
]
"""Outputs that selective checkpointing saves: matrix products, convolutions, fused attention."""


class NotApplicable(Exception):
    """A method has no way to run this model here; says why."""


def eager(model: nn.Module) -> Forward:
    """The plain step: keep everything."""
    return model


def transformers_checkpointing(model: nn.Module) -> Forward:
    """The switch of transformers: every layer is recomputed as a whole.

    Raises:
        NotApplicable: no model of transformers.
    """
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the second in older releases
        if hasattr(model, name):
            getattr(model, name)()
            return model
    raise NotApplicable("no model of transformers")


def checkpointed_blocks(model: nn.Module, every: int = 1, **options: Any) -> Forward:
    """`checkpoint` around one block in `every`; options as for `torch.utils.checkpoint.checkpoint`."""
    blocks = [block for siblings in sequences(model) for block in siblings]
    for block in blocks[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


def selective(model: nn.Module) -> Forward:
    """Every block is recomputed but for the outputs of DEAR_OPS."""
    return checkpointed_blocks(model, context_fn=partial(create_selective_checkpoint_contexts, DEAR_OPS))


def sqrt_segments(model: nn.Module) -> Forward:
    """`checkpoint_sequential` over the blocks in about sqrt(n) segments; the last one is kept, as it does.

    The first block runs them all, each with the further arguments that the first is given, and the others pass on.

    Raises:
        NotApplicable: the blocks are no single sequence.
    """
    found = sequences(model)
    if len(found) != 1:
        raise NotApplicable(f"its blocks are {len(found)} sequences with connections between them, not one")
    forwards = [block.forward for block in found[0]]
    segments = isqrt(len(forwards) - 1) + 1

    def run_all(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        bound = [lambda x, forward=forward: forward(x, *args, **kwargs) for forward in forwards]
        return checkpoint_sequential(bound, segments, hidden, use_reentrant=False)

    for block in found[0]:
        block.forward = lambda hidden, *args, **kwargs: hidden
    found[0][0].forward = run_all
    return model


def sequences(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost lists and sequences of modules that are made of modules: a network's blocks."""
    children = list(model.children())
    listed = isinstance(model, nn.ModuleList | nn.Sequential) and len(children) > 1
    if listed and all(any(True for _ in child.children()) for child in children):
        return [children]
    return [found for child in children for found in sequences(child)]


def compiled(model: nn.Module, backend: str, budget: float) -> Forward:
    """`torch.compile` with an `activation_memory_budget` (1: none). Inductor draws random numbers as eager does.

    Raises:
        NotApplicable: inductor without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if backend == "inductor" and shutil.which(compiler) is None:
        raise NotApplicable(f"inductor needs a C++ compiler; there is no {compiler}")
    options = {"fallback_random": True} if backend == "inductor" else None
    module = torch.compile(model, backend=backend, options=options)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return module(*args, **kwargs)

    return forward


RIVALS: dict[str, Method] = {
    "eager": eager,
    "transformers": transformers_checkpointing,
    "blocks": checkpointed_blocks,
    "half-blocks": partial(checkpointed_blocks, every=2),
    "sqrt-segments": sqrt_segments,
    "selective": selective,
    **{
        f"{backend}-{budget}": partial(compiled, backend=backend, budget=budget)
        for backend in ("aot_eager", "inductor")
        for budget in (1.0, 0.75, 0.5, 0.25)
    },
}
