"""Gradients under dropout, checked from outside: central differences in float64, the same seed before every forward."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import plan
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.results.plan import Plan
from planner.rewriter.partition import partition
from planner.runtime.guards.call_key import call_key
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import RewrittenStep
from planner.solver.solve import Solver
from planner.tracer.capture import capture
from planner.tracer.lower import lower
from tests.support.strategies import scatter


class Dropped(nn.Module):
    """Attention dropout (fused and by hand), F.dropout, nn.Dropout and stochastic depth on whole samples."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.3)

    def attend(self, x, fused):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if fused:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        else:
            mixed = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.2) @ v
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x):
        for fused in (True, False):
            x = x + F.dropout(self.attend(x, fused), 0.25)
            keep = (torch.rand(x.shape[0], 1, 1, dtype=x.dtype) < 0.7).to(x.dtype) / 0.7
            x = x + keep * self.down(self.drop(F.gelu(self.up(x))))
        return x.square().mean()


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropped().double().train()


X = torch.linspace(-1, 1, 8 * 12 * 16, dtype=torch.float64).reshape(8, 12, 16).sin()


def seeded_loss(module, seed):
    torch.manual_seed(seed)
    return module(X)


def moved(model, directions, by):
    """The loss with every parameter moved along its direction."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, direction in zip(twin.parameters(), directions, strict=True):
            parameter.add_(direction, alpha=by)
        return seeded_loss(twin, 5)


def assert_gradients_are_differences(model, module):
    module.zero_grad()
    seeded_loss(module, 5).backward()
    torch.manual_seed(1)
    step = 1e-5
    for parameter in model.parameters():
        direction = [torch.randn_like(p) if p is parameter else torch.zeros_like(p) for p in model.parameters()]
        numeric = (moved(model, direction, step) - moved(model, direction, -step)) / (2 * step)
        torch.testing.assert_close(
            (parameter.grad * direction[position(model, parameter)]).sum(), numeric, rtol=1e-6, atol=1e-9
        )
    module.zero_grad()


def position(model, parameter):
    return next(i for i, p in enumerate(model.parameters()) if p is parameter)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_gradients_equal_central_differences_at_every_budget(model, share):
    with torch.random.fork_rng():
        full = plan(model, 1.0, (X,), costs="estimate", progress=False).plan
        lowest = Solver(full.graph).lowest_peak(Limits(2.0))
        budget = lowest + lowest // 99 + int(share * (full.plain.peak_bytes - lowest))
        module = plan(model, min(budget, full.plain.peak_bytes), (X,), costs="estimate", progress=False)
        assert bool(module.plan.solution.schedule.recomputes()) == (share < 1.0)
        assert_gradients_are_differences(model, module)


def test_gradients_equal_central_differences_where_every_mask_is_drawn_again(model):
    with torch.random.fork_rng():
        joint = capture(model, (X,))
        graph = lower(joint)
        schedule = scatter(graph, random.Random(0), keep=0.0)
        again = [graph.ops[schedule.steps[t]] for t in schedule.recomputes()]
        assert sum(read.startswith("rng_state") for op in again for read in op.reads) >= 8
        key = call_key([X], joint)
        kept = Plan(graph, 2**40, 0, Solution("feasible", schedule, 0, 0.0, "test"))
        module = CheckpointedModule(model, RewrittenStep(joint, partition(joint, graph, schedule), key), kept)
        assert_gradients_are_differences(model, module)
