"""Batch norm that updates its running statistics behind the graph's back, as cuDNN's does: it runs again on copies of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import plan
from planner.kernels import batch_norm, observed
from planner.kernels.batch_norm import BatchNorm
from tests.support.training import assert_same, trajectory

aten = torch.ops.aten


def norm(x, weight, bias, mean, var, training, momentum, eps):
    """As `cudnn_batch_norm`: the schema tells of no write; the fourth result is no statistic, but what the backward reads."""
    out, saved_mean, saved_var = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return out, saved_mean, saved_var, saved_mean.new_empty(0)


def fake_norm(x, weight, bias, mean, var, training, momentum, eps):
    saved = x.new_empty(x.shape[1])
    return torch.empty_like(x), saved, torch.empty_like(saved), x.new_empty(0)


def save(ctx, inputs, output):
    x, weight, _, mean, var, _, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, mean, var, *output[1:])


def backward(ctx, grad, *_):
    x, weight, mean, var, saved_mean, saved_var, reserve = ctx.saved_tensors
    return *torch.ops.hidden.norm_backward(grad, x, weight, mean, var, saved_mean, saved_var, reserve, ctx.eps), *[None] * 5


def norm_backward(grad, x, weight, mean, var, saved_mean, saved_var, reserve, eps):
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, saved_mean, saved_var, True, eps, [True] * 3)


@pytest.fixture
def hidden(monkeypatch):
    with torch.library._scoped_library("hidden", "DEF") as library:
        tensors = "Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var"
        library.define(f"norm({tensors}, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)")
        library.define(
            "norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor saved_mean, "
            "Tensor saved_var, Tensor reserve, float eps) -> (Tensor, Tensor, Tensor)"
        )
        library.impl("norm", norm, "CPU")
        library.impl("norm_backward", norm_backward, "CPU")
        torch.library.register_fake("hidden::norm", fake_norm, lib=library)
        torch.library.register_fake(
            "hidden::norm_backward",
            lambda grad, x, weight, *_: (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)),
            lib=library,
        )
        torch.library.register_autograd("hidden::norm", backward, setup_context=save, lib=library)
        monkeypatch.setitem(batch_norm.KERNELS, torch.ops.hidden.norm.default, BatchNorm(training=5, writes_in_place=True))
        monkeypatch.setattr(observed, "OWN_NAMESPACES", observed.OWN_NAMESPACES | {"hidden"})  # as if it were torch's
        yield


class Norm(nn.BatchNorm2d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.ops.hidden.norm(x, self.weight, self.bias, self.running_mean, self.running_var, True, 0.1, 1e-5)[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4 if i else 3, 4, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(Norm(4) for _ in range(4))

    def forward(self, x):
        for conv, norm_ in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm_(conv(x)))
        return x.square().mean()


def test_it_runs_again_and_counts_the_batch_once(hidden):
    torch.manual_seed(0)
    model, x = Net().train(), torch.randn(8, 3, 16, 16)
    planned = plan(copy.deepcopy(model), 0.7, (x,), costs="estimate", progress=False)
    schedule, ops = planned.plan.solution.schedule, planned.plan.graph.ops
    assert any(ops[schedule.steps[t]].name.startswith("norm") for t in schedule.recomputes())
    assert_same(trajectory(model, (x,), {}), trajectory(planned, (x,), {}))
    assert "clone" in planned.backward_graph.python_code("self").src, "what it updates again is thrown away"
