"""Hooks on an output that another output is computed from: eager's see a gradient that a plan does not return."""

import copy
import functools
import importlib.util
import sys

import pytest
import torch
from torch import nn

from planner import BackwardError, export_source, plan


class Net(nn.Module):
    """A loss and an activation that it is computed from; `side` goes nowhere else."""

    def __init__(self, left=False):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.left, self.kept = left, None

    def forward(self, x):
        h = torch.tanh(self.a(x))
        loss, side = self.b(h).square().sum(), self.c(h)
        if self.left:
            self.kept = h
            return loss, side
        return loss, h, side


def made(loss=0, **options):
    torch.manual_seed(0)
    model = Net(**options)
    return copy.deepcopy(model), plan(model, 1.0, (torch.randn(3, 4),), loss=loss, progress=False)


def _watch(output, how):
    """What a hook on an output will see; nothing where it is to keep its gradient itself."""
    seen = []
    if how == "retain_grad":
        output.retain_grad()
    else:
        output.register_hook(lambda gradient: seen.append(gradient))
    return seen


@pytest.mark.parametrize("how", ["hook", "retain_grad"])
@pytest.mark.parametrize("total", [lambda loss, h: loss, lambda loss, h: loss + h.sum()], ids=["loss", "sum"])
@pytest.mark.parametrize("left", [False, True], ids=["returned", "left"])
def test_one_that_others_are_computed_from_is_refused(left, total, how):
    _, planned = made(left=left)
    out = planned(torch.randn(3, 4))
    h = planned.kept if left else out[1]
    _watch(h, how)
    with pytest.raises(BackwardError, match="a hook, or retain_grad"):
        total(out[0], h).backward()


def test_the_plan_for_both_outputs_refuses_too():
    _, planned = made(loss=lambda out: out[:2])
    loss, h, _ = planned(torch.randn(3, 4))
    h.retain_grad()
    with pytest.raises(BackwardError, match=r"\[1\]"):
        (loss + h.sum()).backward()


@pytest.mark.parametrize("how", ["hook", "retain_grad"])
def test_where_all_of_the_gradient_comes_from_outside_it_is_eagers(how):
    eager, planned = made(loss=lambda out: (out[0], out[2]))
    x = torch.randn(3, 4)
    found = []
    for model in (eager, planned):
        loss, h, side = model(x)
        seen = [_watch(side, how), _watch(loss, how)]
        (loss + side.square().sum()).backward()
        found.append([side.grad, loss.grad] if how == "retain_grad" else [one for [one] in seen])
        loss, h, side = model(x)
        _watch(h, how)
        h.square().sum().backward()  # and no gradient of the loss
        found[-1] += [h.grad] if how == "retain_grad" else []
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_hooks_of_torchs_wrappers_are_no_concern():
    def ask(count, gradient):
        count.append(1)

    ask.__module__ = "torch.distributed.fsdp._some_place"
    _, planned = made()
    loss, h, _ = planned(torch.randn(3, 4))
    h.register_hook(functools.update_wrapper(functools.partial(ask, []), ask))
    loss.backward()
    assert planned.a.weight.grad is not None


def test_an_exported_file_refuses_as_well(tmp_path, monkeypatch):
    _, planned = made()
    path = tmp_path / "step.py"
    export_source(planned, path)
    spec = importlib.util.spec_from_file_location("step", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "step", module)  # where dataclasses look
    spec.loader.exec_module(module)
    loss, h, _ = module.Net()(torch.randn(3, 4))
    h.retain_grad()
    with pytest.raises(module.BackwardError, match="a hook, or retain_grad"):
        loss.backward()
