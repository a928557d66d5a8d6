"""Where a trace would differ from eager, and must not: autocast's cached casts, Python's own state, caches of functions."""

import copy
import random
from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from torch import nn

from planner import CaptureError, plan, verify
from planner.profiler.measure import measure
from planner.tracer.capture import capture
from planner.tracer.lower import kernel_nodes, lower
from tests.support.models import Wrapped
from tests.support.training import assert_same, loss_of

X = torch.linspace(-1, 1, 64).reshape(8, 8)


class Reused(nn.Module):
    """One layer three times; `also` uses its weight outside of autocast's reach once more."""

    def __init__(self, also=False, region=False):
        super().__init__()
        self.layer, self.also, self.region = nn.Linear(8, 8), also, region

    def block(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x

    def forward(self, x):
        if self.region:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.block(x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layer(x)
            return x.float()
        out = self.block(x)
        return out + self.layer.weight.sin() if self.also else out


def gradients(module, cast):
    """Under autocast, of a step from empty gradients."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
        loss = loss_of(module(X))
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("also", [False, True])
def test_a_weight_used_again_under_autocast_has_eagers_gradient(also):
    torch.manual_seed(0)
    model = Wrapped(Reused(also)).train()
    with torch.autocast("cpu", torch.bfloat16):
        module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert_same(gradients(copy.deepcopy(model), True), gradients(module, True))


def test_the_cast_is_one_node():
    model = Wrapped(Reused()).train()
    with torch.autocast("cpu", torch.bfloat16):
        graph = capture(model, (X,)).graph
    for name in ("primals_1", "primals_2"):
        (node,) = (node for node in graph.find_nodes(op="placeholder") if node.name == name)
        assert sum(user.target is torch.ops.aten._to_copy.default for user in node.users) == 1


def test_regions_of_the_models_own_do_not_share_casts():
    torch.manual_seed(0)
    model = Wrapped(Reused(region=True)).train()
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert_same(gradients(copy.deepcopy(model), False), gradients(module, False))
    assert verify(module, (X,), rounds=0).exact  # which brings no context that would make the regions inner ones


class Teaching(nn.Module):
    """Uses its weight without gradient first: under autocast eager then loses the gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            target = self.layer(x)
        return self.layer(x) - target * 0.5


def test_a_weight_cast_without_gradient_first_is_refused_under_autocast_only():
    model = Wrapped(Teaching()).train()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="loses the gradient"):
        capture(model, (X,))
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert_same(gradients(copy.deepcopy(model), False), gradients(module, False))


class Drawing(nn.Module):
    """Skips a layer by Python's random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if random.random() < 2 else x


def test_pythons_random_numbers_are_refused_and_their_state_is_kept():
    model = Drawing().train()
    state = random.getstate()
    with pytest.raises(CaptureError, match="random module"):
        capture(model, (X,))
    assert random.getstate() == state


class Cached(nn.Module):
    """Keeps a tensor in a function's cache and another in a dictionary of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), {}

    @staticmethod
    @lru_cache(maxsize=4)
    def ramp(size):
        return torch.arange(size, dtype=torch.float32)

    def forward(self, x):
        if "eye" not in self.seen:
            self.seen["eye"] = torch.eye(8)
        return self.layer(x) * self.ramp(8) @ self.seen["eye"]


def test_caches_hold_no_traced_tensors_afterwards():
    model = Wrapped(Cached()).train()
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    assert model.body.seen == {} and Cached.ramp.cache_info().currsize == 0
    twin = copy.deepcopy(model)
    assert_same(gradients(twin, False), gradients(module, False))  # the first call fills the dictionary, as eager's does
    assert_same(gradients(twin, False), gradients(module, False))
    assert torch.equal(model.body.seen["eye"], twin.body.seen["eye"]) and module.num_unplanned_calls == 0
    assert type(Cached.ramp(8)) is torch.Tensor


def test_what_a_kernels_outputs_hold_beyond_their_shape_is_counted():
    """mse_loss hands out a scalar whose storage holds the losses it is the mean of."""
    target = torch.randn(64, 64)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.mse_loss(self.layer(x), target)

    joint = capture(Loss().train(), (torch.randn(64, 64),))
    graph = lower(joint, measure(kernel_nodes(joint), joint.device, cache_dir=None, progress=False))
    real = nn.functional.mse_loss(torch.randn(64, 64), target).untyped_storage().nbytes()
    assert graph.value["mse_loss"].nbytes == real
