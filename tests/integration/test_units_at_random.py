"""plan_units on models that call their blocks at random: skipped in some steps, or called first without gradients."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from planner import plan_units
from planner.profiler.memory import logical_peak

DRAWS = {"torch": lambda: torch.rand(()).item(), "python": random.random, "numpy": np.random.rand}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.narrow(torch.nn.functional.gelu(self.wide(x))))


class Skipping(nn.Module):
    """LayerDrop: each block is skipped in some steps."""

    def __init__(self, draw: str, p: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
        self.blocks, self.draw, self.p, self.num_called = nn.ModuleList(Block() for _ in range(5)), draw, p, 5

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if DRAWS[self.draw]() >= self.p and i < self.num_called:
                x = block(x)
        return self.head(x).square().mean()


class Conditioned(Skipping):
    """Self-conditioning: in some steps the blocks run once more before, without gradients."""

    def forward(self, x):
        hidden = self.embed(x)
        if DRAWS[self.draw]() < self.p:
            with torch.no_grad():
                for block in self.blocks:
                    hidden = block(hidden)
            hidden = hidden + self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).square().mean()


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("kind", [Skipping, Conditioned])
@pytest.mark.parametrize("draw", DRAWS)
def test_blocks_that_are_called_at_random_are_units(kind, draw):
    seeded(1)
    model, x = kind(draw, 0.3), torch.randn(64, 16)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan_units(model, 0.8, (x,), progress=False, costs="estimate", effort=0.3)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        assert not found.left and len(found.planned) == 5
        assert found.verify((x,)).exact
        resident = sum(tensor.nbytes for tensor in (*model.parameters(), x))
        for seed in range(8):
            seeded(seed)
            model.zero_grad(set_to_none=True)
            assert logical_peak(lambda: model(x).backward(), x.device) + resident <= found.budget_bytes


def test_a_block_that_no_step_calls_is_left_and_named():
    torch.manual_seed(0)
    model = Skipping("torch", 0.3)
    model.num_called = 4
    found = plan_units(model, 0.9, (torch.randn(64, 16),), progress=False, costs="estimate", effort=0.3)
    assert len(found.planned) == 4
    assert found.left == {"blocks.4": "no step that was tried calls it with gradients"}
