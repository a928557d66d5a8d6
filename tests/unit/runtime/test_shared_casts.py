"""Several calls within one autocast region: eager's calls share the casts of the weights there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from planner import MismatchError, MismatchWarning, plan
from planner.runtime.install import install


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two of the size that is planned for, and a smaller one."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 16, generator=generator) for n in (4, 4, 2))


def region(cached: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)


def in_one_region(call: Callable, cached: bool) -> torch.Tensor:
    x, y, _ = inputs()
    with region(cached):
        return call(x).mean() + call(y).square().mean()


def in_two_regions(call: Callable, cached: bool) -> torch.Tensor:
    x, y, _ = inputs()
    with region(cached):
        loss = call(x).mean()
    with region(cached):
        return loss + call(y).square().mean()


def after_an_unplanned_call(call: Callable, cached: bool) -> torch.Tensor:
    _, y, small = inputs()
    with region(cached):
        return call(small).mean() + call(y).square().mean()


def before_an_unplanned_call(call: Callable, cached: bool) -> torch.Tensor:
    _, y, small = inputs()
    with region(cached):
        return call(y).square().mean() + call(small).mean()


def with_an_evaluation(call: Callable, cached: bool) -> torch.Tensor:
    x, y, _ = inputs()
    with region(cached):
        loss = call(x).mean()
        with torch.no_grad():
            call(y)
        return loss


def gradients(loop: Callable, cached: bool, prepared: Callable | None = None) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    model = Net()
    call = model
    if prepared is not None:
        with region(cached):
            call = prepared(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MismatchWarning)
        loop(call, cached).float().backward()
    return [parameter.grad for parameter in model.parameters()]


def planned(model: nn.Module) -> nn.Module:
    return plan(model, 1 << 20, (inputs()[0],), progress=False, costs="estimate")


def planned_for_two_sizes(model: nn.Module) -> nn.Module:
    return plan(model, 1 << 20, (inputs()[2],), progress=False, costs="estimate", also=[((inputs()[0],), {})])


def installed(model: nn.Module) -> nn.Module:
    install(model, planned(model))
    return model


@pytest.mark.parametrize("prepared", [planned, installed])
@pytest.mark.parametrize("loop", [in_one_region, before_an_unplanned_call])
def test_a_call_after_a_planned_one_in_a_region_is_an_error(loop, prepared):
    with pytest.raises(MismatchError, match="by another call within one") as caught:
        gradients(loop, True, prepared)
    assert "cache_enabled=False" in str(caught.value) and "bfloat16" in str(caught.value)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("prepared", [planned, installed, planned_for_two_sizes])
@pytest.mark.parametrize(
    ("loop", "cached"),
    [
        (in_one_region, False),
        (in_two_regions, True),
        (in_two_regions, False),
        (after_an_unplanned_call, False),
        (before_an_unplanned_call, False),
        (with_an_evaluation, True),
    ],
)
def test_the_ways_that_the_error_names_give_eagers_bits(loop, cached, prepared):
    expected = gradients(loop, cached)
    assert all(map(torch.equal, expected, gradients(loop, cached, prepared)))


@pytest.mark.parametrize("prepared", [planned, installed])
def test_a_call_after_an_unplanned_one_runs_unplanned_too(prepared):
    expected = gradients(after_an_unplanned_call, True)
    assert all(map(torch.equal, expected, gradients(after_an_unplanned_call, True, prepared)))


def test_a_region_after_an_error_is_a_new_one():
    torch.manual_seed(0)
    model = Net()
    x, y, _ = inputs()
    with region():
        module = planned(model)
        module(x)
        with pytest.raises(MismatchError):
            module(y)
    with region():
        loss = module(y).sum()
    loss.backward()


@pytest.mark.parametrize("is_tied", [True, False])
def test_two_planned_modules_in_a_region_are_an_error_where_they_share_a_weight_that_is_cast(is_tied):
    def gradients_of(is_planned: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        modules = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)]
        modules[1][1].weight = modules[0][1].weight  # layer norm's is cast by nobody
        if is_tied:
            modules[1][0].weight = modules[0][0].weight
        x = torch.randn(4, 8)
        with region():
            called = [plan(m, 1 << 20, (x,), progress=False, costs="estimate") for m in modules] if is_planned else modules
        with region():
            loss = called[0](x).square().mean() + called[1](2 * x).mean()
        loss.float().backward()
        return [parameter.grad for module in modules for parameter in module.parameters()]

    if is_tied:
        with pytest.raises(MismatchError, match="a weight is used by a planned call and by another"):
            gradients_of(True)
    else:
        assert all(map(torch.equal, gradients_of(False), gradients_of(True)))
