"""A planned model is changed, then copied: the copy is compared with what was planned, not with what was copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from planner import install, plan

QUICK = {"costs": "estimate", "progress": False}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.sigmoid(self.a(x)) * 2))).square().mean()


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def add_backward_hook(net):
    net.b.register_full_backward_hook(lambda module, given, arrived: (given[0] * 2,))


def add_forward_hook(net):
    net.b.register_forward_hook(lambda module, args, out: out * 3)


def change_class(net):
    net.b.__class__ = Doubled


def replace_submodule(net):
    net.b = nn.Sequential(net.b, nn.Tanh())


def untie(net):
    net.b.weight = nn.Parameter(net.a.weight.detach() * 1.5)


def append_submodule(net):
    net.more = nn.Linear(8, 8)


CHANGES = [add_backward_hook, add_forward_hook, change_class, replace_submodule, untie]


def gradients(net):
    net.zero_grad()
    net(X).backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.one_in(4)
@pytest.mark.filterwarnings("ignore::planner.MismatchWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("installed", [False, True], ids=["planned", "installed"])
def test_a_copy_of_a_changed_model_trains_as_the_changed_model(change, installed):
    plain, net = Net(), Net()
    module = plan(net, 1.0, (X,), **QUICK)
    if installed:
        install(net, module)
        module = net
    change(plain)
    change(net)
    expected = gradients(plain)
    found = gradients(copy.deepcopy(module))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_copy_without_a_change_runs_planned():
    net = Net()
    module = copy.deepcopy(plan(net, 1.0, (X,), **QUICK))
    assert module.mismatch((X,), {}) is None


def test_a_change_that_is_undone_runs_planned_again():
    net = Net()
    module = plan(net, 1.0, (X,), **QUICK)
    handle = net.b.register_forward_hook(lambda module, args, out: out * 3)
    copied = copy.deepcopy(module)
    assert "hook" in str(copied.mismatch((X,), {}))
    copied.original.b._forward_hooks.clear()
    assert copied.mismatch((X,), {}) is None
    handle.remove()
    assert module.mismatch((X,), {}) is None
