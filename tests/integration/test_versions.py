"""Graphs of other calls stay usable: what a plan writes counts as a new version exactly where eager's write does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from planner import install, plan, uninstall
from tests.support.training import assert_same

QUICK = {"progress": False, "costs": "estimate", "effort": 0.3}


def net(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), norm, nn.Tanh(), nn.Conv1d(8, 2, 1))


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "without weights": lambda: nn.BatchNorm1d(8, affine=False),
    "instance norm": lambda: nn.InstanceNorm1d(8, track_running_stats=True, affine=True),
}
X, SMALLER = torch.randn(6, 4, 5), torch.randn(3, 4, 5)


def one_backward(model, calls):
    sum(model(x).square().mean() for x in calls).backward()
    return [p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()]


def versions(model) -> list[int]:
    return [buffer._version for buffer in model.buffers()]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("calls", [(SMALLER, X), (X, SMALLER), (SMALLER, X, X, SMALLER)], ids=["before", "after", "around"])
def test_planned_and_unplanned_calls_in_one_backward(name, calls):
    model = net(NORMS[name]())
    eager = copy.deepcopy(model)
    planned = plan(model, 1.0, (X,), **QUICK)
    before = versions(model), versions(eager)
    install(model, planned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = one_backward(model, calls), one_backward(eager, calls)
    uninstall(model)
    assert_same(expected, found)
    assert [b - a for a, b in zip(before[0], versions(model), strict=True)] == [
        b - a for a, b in zip(before[1], versions(eager), strict=True)
    ]


@pytest.mark.parametrize("name", ["batch norm", "instance norm"])
def test_planning_between_a_forward_and_its_backward(name):
    model = net(NORMS[name]())
    eager = copy.deepcopy(model)
    losses = [each(X).square().mean() for each in (eager, model)]
    plan(model, 1.0, (X,), **QUICK)
    for loss in losses:
        loss.backward()
    assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:.*forwards wait")
def test_a_size_that_is_captured_between_a_forward_and_its_backward():
    model = net(nn.BatchNorm1d(8))
    eager = copy.deepcopy(model)
    planned = plan(model, 1.0, (X,), dynamic=True, **QUICK)
    assert_same(one_backward(eager, (X, SMALLER, X)), one_backward(planned, (X, SMALLER, X)))
    assert planned.num_unplanned_calls == 0
