"""Containers that several modules share, or whose class forbids the usual methods: left as eager leaves them."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from planner import CaptureError, plan
from tests.support.training import assert_same, trajectory


class Output(OrderedDict):
    """As the outputs of diffusers: some methods of a dict are errors."""

    def update(self, *args, **kwargs):
        raise RuntimeError("no update")

    def clear(self):
        raise RuntimeError("no clear")


class Logs(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.layer, self.log = nn.Linear(4, 4), log

    def forward(self, x):
        h = self.layer(x)
        self.log.append(h.mean())
        return h


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []
        self.first, self.second, self.last = Logs(self.log), Logs(self.log), Output(total=None)

    def forward(self, x):
        h = self.second(torch.tanh(self.first(x)))
        self.last["total"] = h.sum()
        return h.square().mean()


def test_a_list_in_several_places_is_appended_to_once_and_a_guarded_dict_is_put_back():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert model.log == [] and model.last == {"total": None}
    assert_same(trajectory(twin, (x,), {}), trajectory(planned, (x,), {}))
    assert planned.mismatch((x,), {}) is None and len(model.log) == len(twin.log) == 6
    assert_same(twin.log, model.log)
    assert torch.equal(twin.last["total"], model.last["total"])


class Head(nn.Module):
    """Puts its result into a list that others hold, too."""

    def __init__(self, heads):
        super().__init__()
        self.layer, self.heads = nn.Linear(4, 4), heads

    def forward(self, x):
        out = self.layer(x)
        self.heads[0] = out
        return out


class Named(nn.Module):
    """Reads names from a list that others hold, too."""

    def __init__(self, names):
        super().__init__()
        self.weights, self.names = nn.ModuleDict({name: nn.Linear(4, 4) for name in names}), names

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(self.weights[name](x))
        return x


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.names = [torch.rand(1)], ["default"]
        self.first, self.second = Head(self.heads), Head(self.heads)
        self.one, self.two, self.three = Named(self.names), Named(self.names), Named(self.names)

    def forward(self, x):
        h = self.three(self.two(self.one(self.second(torch.tanh(self.first(x))))))
        return (h * self.heads[0]).square().mean()


def test_a_list_in_several_places_does_not_grow():
    torch.manual_seed(0)
    model, x = Shares(), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert_same(trajectory(twin, (x,), {}), trajectory(planned, (x,), {}))
    assert planned.num_unplanned_calls == 0 and planned.mismatch((x,), {}) is None
    assert model.names == ["default"] and model.one.names is model.three.names is model.names
    assert len(model.heads) == 1 and model.first.heads is model.heads and torch.equal(model.heads[0], twin.heads[0])


class Plain(list):
    pass


class Table(dict):
    pass


class Line(deque):
    pass


@pytest.mark.parametrize("made", [lambda t: Plain([t]), lambda t: Table(k=t), lambda t: Line([t]), lambda t: [Plain([t])]])
def test_derived_containers_hold_what_they_held(made):
    """While a step is traced, they hold what stands for their tensors; planning left that there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.held = nn.Linear(8, 8), made(torch.ones(8))

        def forward(self, x):
            held = self.held["k"] if isinstance(self.held, dict) else self.held[0]
            return torch.tanh(self.inner(x)) * (held[0] if isinstance(held, list) else held)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 8)
    before = items(model.held)
    module = plan(model, 1 << 20, (x,), costs="estimate", progress=False)
    assert all(a is b for a, b in zip(before, items(model.held), strict=True))
    assert torch.equal(module(x), model(x)) and module.num_planned_calls == 1


def items(value):
    held = value.values() if isinstance(value, dict) else value
    return [leaf for item in held for leaf in (items(item) if isinstance(item, list) else [item])]


class OddLength(list):
    """A list whose own length says nothing."""

    __len__ = None


class OddItems(dict):
    """A dictionary that gives other things than it holds."""

    def items(self):
        raise LookupError("items")

    __iter__ = None


@pytest.mark.parametrize(("kind", "holds"), [(OddLength, "attribute"), (OddLength, "argument"), (OddItems, "attribute")])
def test_containers_are_read_by_pythons_own_methods(kind, holds):
    """What a derived class says of itself is the user's: it is neither asked nor taken for a fault of the planner."""
    held = torch.ones(8) if holds == "attribute" else 2.0
    content = kind({"k": held} if kind is OddItems else [held])
    key = "k" if kind is OddItems else 0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.held = nn.Linear(8, 8), content if holds == "attribute" else None

        def forward(self, x, given=None):
            return torch.tanh(self.inner(x)) * (self.held if given is None else given)[key]

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 8)
    call = (x, content) if holds == "argument" else (x,)
    module = plan(model, 1 << 20, call, costs="estimate", progress=False)
    assert torch.equal(module(*call), model(*call)) and module.num_planned_calls == 1
    if holds == "argument":  # a tensor in it is no input of a plan
        with pytest.raises(CaptureError, match="pass the tensors of the OddLength"):
            plan(model, 1 << 20, (x, kind([torch.ones(8)])), costs="estimate", progress=False)
