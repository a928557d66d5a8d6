"""Hooks that a forward registers on tensors which stay, backward hooks of the older kind, and lists of hooks that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planner import CaptureError, MismatchWarning, PlannerError, plan, plan_units
from tests.support.training import assert_same

Act = Callable[["Net", torch.Tensor], object]


def on_a_weight(net: Net, _: torch.Tensor) -> object:
    return net.first.weight.register_hook(lambda gradient: gradient * 2)


def on_a_weight_once(net: Net, x: torch.Tensor) -> object:
    if net.handle is None:
        net.handle = on_a_weight(net, x)
    return net.handle


def after_accumulation(net: Net, _: torch.Tensor) -> object:
    return net.first.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def on_an_input(_: Net, x: torch.Tensor) -> object:
    return x.register_hook(lambda gradient: gradient * 2)


class Net(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        self.first, self.last, self.act, self.handle = nn.Linear(16, 64), nn.Linear(64, 16), act, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.act(self, x)
        return self.last(torch.relu(self.first(x))).square().sum()


def hooks_of(net: Net, x: torch.Tensor) -> list[Any]:
    tensors = (*net.parameters(), x)
    return [(tensor._backward_hooks, tensor._post_accumulate_grad_hooks) for tensor in tensors]


@pytest.mark.parametrize("act", [on_a_weight, on_a_weight_once, after_accumulation, on_an_input], ids=lambda act: act.__name__)
def test_a_forward_that_registers_hooks_where_they_stay(act: Act) -> None:
    torch.manual_seed(0)
    model, eager = Net(act), Net(act)
    eager.load_state_dict(model.state_dict())
    x = torch.randn(64, 16, requires_grad=act is on_an_input)
    before = hooks_of(model, x)
    with pytest.raises(CaptureError, match=r"registers a hook on a weight, or on another tensor"):
        plan(model, 1.0, (x,), progress=False)
    assert hooks_of(model, x) == before and model.handle is None
    plan_units(model, "1MiB", (x,), progress=False)
    assert hooks_of(model, x) == before and model.handle is None
    mine, theirs = (x.detach().clone().requires_grad_(x.requires_grad) for _ in range(2))
    for _ in range(2):
        for net, given in ((model, mine), (eager, theirs)):
            net.zero_grad()
            given.grad = None
            net(given).backward()
        assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])
    assert mine.grad is theirs.grad or torch.equal(mine.grad, theirs.grad)


OLDER = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")  # torch's own


def doubled(_module: nn.Module, gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(gradient if gradient is None else gradient * 2 for gradient in gradients)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


@OLDER
@pytest.mark.parametrize("where", ["", "blocks.1", "blocks.1.2", "blocks.2"])
def test_backward_hooks_of_the_older_kind_get_eagers_gradients(where: str) -> None:
    torch.manual_seed(0)
    model, eager, x = Blocks(), Blocks(), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    for net in (model, eager):
        net.get_submodule(where).register_backward_hook(doubled)
    if not where:
        with pytest.raises(CaptureError, match="register_full_backward_hook"):
            plan(model, 1.0, (x,), progress=False)
    plan_units(model, "4MiB", (x,), progress=False)
    for _ in range(2):
        for net in (model, eager):
            net.zero_grad()
            net(x).backward()
        assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])


@OLDER
def test_one_that_comes_later_is_named() -> None:
    torch.manual_seed(0)
    model, eager, x = Blocks(), Blocks(), torch.randn(64, 16)
    eager.load_state_dict(model.state_dict())
    planned = plan(model, 1.0, (x,), progress=False)
    planned(x).backward()
    for net in (model, eager):
        net.zero_grad()
        net.register_backward_hook(doubled)
    with pytest.warns(MismatchWarning, match="register_full_backward_hook"):
        planned(x).backward()
    eager(x).backward()
    assert_same([p.grad for p in eager.parameters()], [p.grad for p in model.parameters()])


class CountsHooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * (1 + len(self._forward_hooks))).square().sum()


def test_a_model_with_hooks_whose_forward_counts_them_is_refused() -> None:
    model, x = CountsHooks(), torch.randn(4, 16)
    assert plan(model, 1.0, (x,), progress=False)(x) == model(x)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"reads its list of hooks \(_forward_hooks\)"):
        plan(model, 1.0, (x,), progress=False)


SWITCHES: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("how", [plan, plan_units], ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_refusal_leaves_switches_as_they_were(name: str, how: Callable[..., object]) -> None:
    change, state = SWITCHES[name]

    def act(_net: Net, _x: torch.Tensor) -> None:
        change()
        raise ValueError("no such day")

    before = state()
    with pytest.raises(PlannerError, match="no such day"):
        how(Net(act), 1.0, (torch.randn(4, 16),), progress=False)
    assert state() == before


def test_a_class_that_names_no_python_module() -> None:
    kind = eval("type('C', (), {'scale': 2.0})", {"__builtins__": {"type": type}})
    net = Net(lambda net, _: net.held.scale)
    net.held = kind()
    plan(net, 1.0, (torch.randn(4, 16),), progress=False)
