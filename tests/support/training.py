"""Trains a module for a few steps and returns every tensor that must not change under planning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def loss_of(out: Any) -> torch.Tensor:
    """The tensor backward starts from."""
    if isinstance(out, torch.Tensor):
        return out
    return out["loss"] if "loss" in out else next(iter(out.values()))


def trajectory(module: nn.Module, args: Any, kwargs: Any, *, steps: int = 3, accumulate: int = 1) -> list[torch.Tensor]:
    """Outputs and gradients of every step, then buffers, parameters and the RNG state; seeded, the caller's RNG untouched."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    seen: list[torch.Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for _ in range(steps):
            for _ in range(accumulate):
                out = module(*args, **kwargs)
                loss_of(out).backward()
                seen += [leaf.detach().clone() for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            seen += [p.grad.clone() for p in module.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        state = torch.get_rng_state()
    return [*seen, *(b.clone() for b in module.buffers()), *(p.detach().clone() for p in module.parameters()), state]


def assert_same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Bit-equal, tensor by tensor."""
    assert len(expected) == len(found)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"tensor {i}"
        assert torch.equal(a, b), f"tensor {i} differs by {(a.double() - b.double()).abs().max()}"
