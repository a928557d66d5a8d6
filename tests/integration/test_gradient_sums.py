"""Tensors that a planned call uses several times, and the caller as well: autograd adds up one use after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import BackwardError, CaptureError, plan, plan_units
from planner.profiler.memory import logical_peak

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))


class Uses(nn.Module):
    """Uses one weight, and its input, this many times."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.a, self.b, self.count = nn.Linear(32, 32, bias=False), nn.Linear(32, 32), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.b(x))
        for _ in range(self.count):
            h = torch.tanh(F.linear(h, self.a.weight)) * x
        return h.square().mean()


CALLER = {
    "penalty after": lambda call, net, x: call(x) + 0.01 * net.a.weight.pow(2).sum(),
    "penalty before": lambda call, net, x: 0.01 * net.a.weight.pow(2).sum() + call(x),
    "linear after": lambda call, net, x: call(x) + F.linear(x, net.a.weight).sin().mean(),
    "called twice": lambda call, net, x: call(x) + call(x * 0.5),
    "input after": lambda call, net, x: call(x) + x.sin().mean(),
    "all of it": lambda call, net, x: call(x) + call(x.cos()) + x.sin().mean() + net.a.weight.norm(),
}


def gradients(call: nn.Module, net: Uses, how: str, *, is_leaf: bool) -> list[torch.Tensor]:
    found = []
    for i in range(2):
        net.zero_grad()
        given = (X + i).requires_grad_()
        x = given if is_leaf else given * 1.5
        CALLER[how](call, net, x).backward()
        found += [given.grad, *(p.grad.clone() for p in net.parameters())]
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("how", CALLER)
def test_uses_by_the_caller(how, count, is_leaf):
    torch.manual_seed(0)
    net = Uses(count)
    plain = copy.deepcopy(net)
    x = X.clone().requires_grad_()
    planned = plan(net, 1.0, (x if is_leaf else x * 1.5,), progress=False, costs="estimate")
    expected = gradients(plain, plain, how, is_leaf=is_leaf)
    try:
        found = gradients(planned, net, how, is_leaf=is_leaf)
    except BackwardError as error:
        assert "adds up these gradients one by one" in str(error)
        assert count > 1  # what one use contributes is a sum of its own already
        return
    assert planned.num_unplanned_calls == 0
    assert all(map(torch.equal, expected, found))


def test_terms_that_are_returned_one_by_one_need_no_more_memory_than_planned():
    torch.manual_seed(0)
    net = Uses(2)
    planned = plan(net, 0.9, (X,), progress=False)
    assert len(planned.executable.separated) == 1

    def step():
        planned(X).backward()

    step()
    planned.zero_grad(set_to_none=True)
    peak = planned.plan.graph.resident_bytes + logical_peak(step, torch.device("cpu"))
    assert peak <= planned.plan.peak_bytes


def test_a_hook_of_the_weight_gets_the_whole_sum():
    torch.manual_seed(0)
    net = Uses(2)
    plain, seen = copy.deepcopy(net), []
    for module in (plain, net):
        module.a.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    planned = plan(net, 1.0, (X,), progress=False, costs="estimate")
    seen.clear()
    for call, model in ((plain, plain), (planned, net)):
        (call(X) + model.a.weight.pow(2).sum()).backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert torch.equal(plain.a.weight.grad, net.a.weight.grad)


class Weighted(torch.autograd.Function):
    """A product whose own backward adds, in ways that autograd's engine does not."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        return torch.add(gradient * scale, gradient, alpha=2) + gradient * 0.3, None


class AddsItself(nn.Module):
    """Its input reaches the loss in one way or two; where only Python asks about it, that is no use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(32, 32, bias=False), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "a mask":
            return torch.tanh(self.a(Weighted.apply(x, (x > 0).float()))).square().mean()
        if self.how == "a sum before":
            h = x + 1
            return (torch.tanh(self.a(h)) * h).mean() + (x > 0).sum() * 0
        if self.how == "no gradient of one":
            return (torch.tanh(self.a(Weighted.apply(x, x.detach()))) + x.floor()).mean()
        return (torch.tanh(self.a(Weighted.apply(x, torch.ones_like(x)))) * x).mean()


@pytest.mark.parametrize("how", ["a mask", "a sum before", "no gradient of one", "twice"])
def test_what_is_added_inside_of_one_use_is_one_term(how):
    torch.manual_seed(0)
    net = AddsItself(how)
    plain, x = copy.deepcopy(net), (X * 1.5).requires_grad_()
    planned = plan(net, 1.0, (x * 2,), progress=False, costs="estimate")
    found = []
    for call in (plain, planned):
        given = (X * 1.5).requires_grad_()
        h = given * 2
        try:
            (call(h) + h.sin().mean() + h.pow(3).mean()).backward()
        except BackwardError as error:
            assert "adds up these gradients one by one" in str(error)
            return
        found.append(given.grad)
    assert torch.equal(*found)


class Recurrent(nn.Module):
    """A kernel that uses its weights once for each time step, in a submodule that runs as it is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = getattr(nn, kind)(32, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)[0].square().mean()


@pytest.mark.parametrize("how", ["penalty", "twice", "alone"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_weights_of_a_submodule_that_runs_as_it_is(kind, how):
    torch.manual_seed(0)
    net, x = Recurrent(kind), X.reshape(8, 8, 32)
    plain = copy.deepcopy(net)
    planned = plan(net, 1.0, (x,), progress=False, costs="estimate")
    found = []
    for call, model in ((plain, plain), (planned, net)):
        loss = call(x)
        if how == "penalty":
            loss = loss + sum(p.pow(2).sum() for p in model.parameters())
        if how == "twice":
            loss = loss + call(x * 0.5)
        try:
            loss.backward()
        except BackwardError as error:
            assert "adds up these gradients one by one" in str(error)
            assert kind != "LSTM" and how != "alone"  # whose weights one kernel uses
            return
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_backward_that_ends_before_the_weight_leaves_nothing_for_the_next():
    torch.manual_seed(0)
    net = Recurrent("GRU")
    planned, x = plan(net, 1.0, (X.reshape(8, 8, 32),), progress=False, costs="estimate"), X.reshape(8, 8, 32)
    alive = planned(x)
    torch.autograd.grad(planned(x), list(net.parameters()))
    alive.backward()
    plain = copy.deepcopy(net)
    plain.zero_grad()
    plain(x).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Around(nn.Module):
    """Code around blocks that uses what they use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks, self.head, self.how = nn.ModuleList(Block() for _ in range(3)), nn.Linear(32, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks:
            kept.append(x)
            x = block(x)
        if self.how == "skips":
            x = x + torch.stack(kept).sin().sum(0)
        if self.how == "a block's weight":
            x = torch.tanh(F.linear(x, self.blocks[1].a.weight))
        if self.how == "a block's weight, without gradients":
            x = x / self.blocks[1].a.weight.detach().norm()
        return self.head(x).square().mean()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("nothing", ()),
        ("skips", ()),
        ("a block's weight", ("blocks.1.a",)),
        ("a block's weight, without gradients", ()),
    ],
)
def test_units(how, left, autocast):
    torch.manual_seed(0)
    net = Around(how)
    plain, found = copy.deepcopy(net), []
    for model in (plain, net):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            planned = plan_units(net, 1.0, (X,), progress=False, costs="estimate") if model is net else None
        for i in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(X + i)
            loss.backward()
            found.append([p.grad.clone() for p in model.parameters()])
        if planned is not None:
            assert tuple(planned.plan.left) == left
    for expected, own in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, expected, own))


class CarriesAGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.state = nn.Sequential(Block(), Block()), torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.blocks(x) + self.state
        self.state = h.mean()
        return h.square().mean()


def test_a_model_whose_second_step_fails_is_refused_with_its_own_words():
    with pytest.raises(CaptureError, match="a further step raises RuntimeError: Trying to backward through the graph a second"):
        plan_units(CarriesAGraph(), 1.0, (X,), progress=False, costs="estimate")
