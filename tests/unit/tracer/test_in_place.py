"""In-place ops: the graph has none, and yet a plan with the full budget takes no more memory than eager's step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import plan
from planner.profiler.memory import logical_peak
from tests.support.training import assert_same, trajectory

TAILS = {
    "add": lambda y: y.add_(1),
    "add relu": lambda y: y.add_(1).relu_(),
    "leaky relu": lambda y: F.leaky_relu(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "elu": lambda y: F.elu(y, inplace=True),
    "arithmetic": lambda y: y.add_(1).mul_(2).sub_(1).div_(3),
    "clamp": lambda y: y.mul_(2).clamp_(-1, 1),
    "sigmoid": lambda y: y.sigmoid_(),
}


class Tail(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.first, self.second = name, nn.Linear(32, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TAILS[self.name](self.second(TAILS[self.name](self.first(x)))).sum()


def peak(module: nn.Module, x: torch.Tensor) -> int:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(x).backward()

    step()
    module.zero_grad(set_to_none=True)
    return logical_peak(step, x.device)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", TAILS)
def test_a_full_budget_takes_no_more_than_eager(name):
    model, x = Tail(name).train(), torch.randn(512, 32)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert_same(trajectory(copy.deepcopy(model), (x,), {}), trajectory(copy.deepcopy(planned), (x,), {}))
    assert peak(copy.deepcopy(planned), x) <= peak(copy.deepcopy(model), x)


class HandsOutACopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        return {"loss": hidden.square().sum(), "out": hidden.clone()}


def test_a_copy_for_the_caller_stays_a_copy():
    model, x = HandsOutACopy().train(), torch.randn(3, 4)
    planned = plan(copy.deepcopy(model), 1.0, (x,), costs="estimate", progress=False)
    for module in (model, planned):
        out = module(x)
        out["out"].zero_()  # the caller's to write into; backward reads what it was copied from
        out["loss"].backward()
    assert torch.equal(model.first.weight.grad, planned.first.weight.grad)
