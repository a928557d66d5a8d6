"""Tensors that a planned call uses several times, and the caller as well: autograd adds up one use after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import BackwardError, CaptureError, MismatchWarning, plan, plan_units
from planner.profiler.memory import logical_peak

pytestmark = pytest.mark.filterwarnings("ignore:.*forwards wait")  # two calls, one backward
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


@pytest.mark.one_in(10)
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
        assert count > 1 and not how.startswith("penalty")  # of the weight, whose terms are returned one by one
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
            assert how in ("no gradient of one", "twice")
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


@pytest.mark.one_in(6)
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


@pytest.mark.one_in(6)
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


class InOrder(nn.Module):
    """Terms of one input that the captured graph makes in another order than they add up, or that views come late of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.pre, self.deep = nn.LayerNorm(32), nn.Linear(32, 32), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.v, self.how = nn.Parameter(torch.ones(32)), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre(x) if self.how == "of a weight" else x
        if self.how == "passed through":
            h = torch.sin(torch.sin((x + self.v) * torch.tanh(x)))
        elif self.how == "three":
            h = torch.sin((x + self.v) * torch.tanh(x) + x.cos())
        else:
            h = self.norm(x)
            for layer in self.deep:
                h = torch.tanh(layer(h))
            h = h * self.norm.weight + torch.cat([self.v, self.norm.weight])[:32]
        for layer in self.deep:
            h = torch.tanh(layer(h))
        return h.square().mean()


@pytest.mark.one_in(8)
@pytest.mark.parametrize("num_stages", [1, 8])
@pytest.mark.parametrize("caller", ["alone", "twice", "used again"])
@pytest.mark.parametrize("how", ["passed through", "three", "of a weight", "views"])
def test_terms_add_up_in_eagers_order_whatever_the_stages(how, caller, num_stages):
    torch.manual_seed(0)
    net, found = InOrder(how), []
    plain = copy.deepcopy(net)
    planned = plan(
        net, 1.0, (X * 2 * torch.ones(1, requires_grad=True),), progress=False, costs="estimate", num_stages=num_stages
    )
    for call, model in ((plain, plain), (planned, net)):
        given = X.clone().requires_grad_()
        x = given * 2
        loss = call(x)
        if caller == "twice":
            loss = loss + call(x)
        if caller == "used again":
            loss = loss + x.cos().mean() + model.norm.weight.norm()
        try:
            loss.backward()
        except BackwardError as error:
            assert "adds up these gradients one by one" in str(error) and caller != "alone"
            return
        found.append([given.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *found))


def test_terms_of_units_add_up_in_eagers_order():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.units = nn.Linear(32, 32), nn.ModuleList(InOrder("three") for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(unit(self.pre(x)) for unit in self.units)

    torch.manual_seed(0)
    net = Net()
    plain, found = copy.deepcopy(net), []
    plan_units(net, 1.0, (X,), progress=False, costs="estimate")
    for model in (plain, net):
        model(X).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.w = nn.Linear(32, 32), nn.Linear(32, 32), nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.q(x)) * torch.tanh(self.k(y)) * x.sin() * self.w).square().mean()


@pytest.mark.parametrize("called_same", [False, True])
@pytest.mark.parametrize("planned_same", [False, True])
def test_one_tensor_given_twice_is_planned_or_said_to_be_another_call(planned_same, called_same):
    torch.manual_seed(0)
    net, found = Attends(), []
    plain = copy.deepcopy(net)
    x = X.clone().requires_grad_()
    planned = plan(net, 1.0, (x, x if planned_same else x * 2), progress=False, costs="estimate")
    for call, model in ((plain, plain), (planned, net)):
        given = X.clone().requires_grad_()
        other = given if called_same else given * 2
        if call is planned and planned_same != called_same:
            with pytest.warns(MismatchWarning, match="the same inputs are one tensor"):
                out = call(given, other)
        else:
            out = call(given, other)
        out.backward()
        found.append([given.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))


def test_a_parameter_of_the_model_as_its_argument():
    net = Attends()
    with pytest.raises(CaptureError, match="input 1 is the model's own parameter w"):
        plan(net, 1.0, (X, net.w), progress=False, costs="estimate")
    planned = plan(net, 1.0, (X, torch.ones(32, requires_grad=True)), progress=False, costs="estimate")
    with pytest.warns(MismatchWarning, match="input 1 is Parameter, planned for Tensor"):
        planned(X, net.w).backward()


def test_a_hook_on_an_input_is_no_second_use():
    torch.manual_seed(0)
    net = Uses(2)
    plain, found = copy.deepcopy(net), []
    planned = plan(net, 1.0, (X * torch.ones(1, requires_grad=True),), progress=False, costs="estimate")
    for call in (plain, planned):
        given = X.clone().requires_grad_()
        x = given * 1.0
        x.register_hook(lambda gradient: gradient * 2)
        call(x).backward()
        found.append(given.grad)
    assert torch.equal(*found)


class Language(nn.Module):
    """One matrix embeds and predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.drop = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(self.drop(self.embed(tokens))))
        return F.linear(hidden, self.embed.weight).log_softmax(-1).square().mean()


class Convolved(nn.Module):
    """One convolution three times, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.conv(x)) * x
        return x.square().mean()


@pytest.mark.parametrize(("made", "shape"), [(Language, (4, 9)), (Convolved, (2, 4, 8, 8))])
def test_models_that_share_weights_in_two_calls_and_a_penalty(made, shape):
    torch.manual_seed(0)
    net = made()
    is_text = made is Language
    x = torch.randint(32, shape) if is_text else torch.randn(shape).to(memory_format=torch.channels_last)
    plain, found = copy.deepcopy(net), []
    planned = plan(net, 1.0, (x,), progress=False, costs="estimate")
    for call, model in ((plain, plain), (planned, net)):
        torch.manual_seed(5)
        loss = call(x) - 0.5 * call(x.flip(0))
        (loss + sum(p.abs().sum() for p in model.parameters()) * 0.01).backward()
        found.append([p.grad for p in model.parameters()])
    assert planned.num_planned_calls == 2 and planned.executable.separated
    assert all(map(torch.equal, *found))
