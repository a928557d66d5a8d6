"""plan_units on models that call their blocks at random: skipped in some steps, or called first without gradients."""

from __future__ import annotations

import copy
import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from planner import plan_units
from planner.composite.training_step import TrainingStep
from planner.composite.trial import Trial
from planner.profiler.memory import logical_peak
from tests.support.training import assert_same

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


@pytest.mark.one_in(4)
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
    assert found.left == {
        "blocks.4": "the measured step, of those tried the one that saves most, does not call it with gradients"
    }


class Passes(nn.Module):
    """Runs its blocks once or twice, with gradients each time."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.embed, self.blocks, self.draw = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(3)), draw

    def forward(self, x):
        x = self.embed(x)
        for _ in range(1 + (self.draw() < 0.5)):
            for block in self.blocks:
                x = block(x)
        return x.square().mean()


class Branches(nn.Module):
    """Three small blocks, or a wide one that saves far more."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.embed, self.blocks, self.draw = nn.Linear(16, 16), nn.ModuleList(Block() for _ in range(3)), draw
        self.wide = nn.Sequential(nn.Linear(16, 1024), nn.GELU(), nn.Linear(1024, 16))

    def forward(self, x):
        x = self.embed(x)
        if self.draw() < 0.5:
            return self.wide(x).square().mean()
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Drops(Passes):
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.draw() > 0.2:
                x = block(x)
        return x.square().mean()


class Draw:
    """A generator of the model's own."""

    def __init__(self, generator) -> None:
        self.generator = generator

    def __call__(self) -> float:
        own = self.generator
        return torch.rand((), generator=own).item() if isinstance(own, torch.Generator) else own.random()


OWN = {
    "default": lambda: DRAWS["torch"],
    "torch": lambda: Draw(torch.Generator().manual_seed(3)),
    "python": lambda: Draw(random.Random(3)),
    "numpy": lambda: Draw(np.random.default_rng(3)),
    "legacy numpy": lambda: Draw(np.random.RandomState(3)),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("kind", [Passes, Branches, Drops])
@pytest.mark.parametrize("own", OWN)
def test_the_budget_holds_for_other_draws(kind, own):
    torch.manual_seed(0)
    model, x = kind(OWN[own]()), torch.randn(64, 16)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget = 1.0 if kind is Branches else 0.9  # the wide branch is one unit, which has nothing to recompute
        found = plan_units(model, budget, (x,), progress=False, costs="estimate", effort=0.3)
        resident = sum(tensor.nbytes for tensor in (*model.parameters(), x))
        for seed in range(10):
            seeded(seed), model.zero_grad(set_to_none=True), twin.zero_grad(set_to_none=True)
            assert logical_peak(lambda: model(x).backward(), x.device) + resident <= found.budget_bytes
            seeded(seed)
            twin(x).backward()  # with the numbers that planning left in its generator
            assert_same(*([p.grad for p in each.parameters() if p.grad is not None] for each in (twin, model)))


@pytest.mark.parametrize(("p", "num_forwards"), [(0.0, 1), (0.1, 6)])
def test_other_random_states_are_tried_for_a_model_that_draws_alone(p, num_forwards, monkeypatch):
    """One observed step; and where dropout draws, a forward of it and four with other states, which save no more."""
    noted, forward = io.StringIO(), TrainingStep.forward  # a list would be put back after each of them
    monkeypatch.setattr(TrainingStep, "forward", lambda step: (noted.write("."), forward(step))[1])
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(p) if p else nn.Tanh(), nn.Linear(16, 1))
    Trial(model, (torch.randn(4, 16),), {}, None)
    assert len(noted.getvalue()) == num_forwards
