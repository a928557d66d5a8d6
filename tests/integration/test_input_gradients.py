"""Gradients of inputs have eager's strides: those of a leaf, and those of a tensor that an earlier step computed."""

import copy

import pytest
import torch
from torch import nn

from planner import MismatchWarning, plan
from planner.profiler.memory import logical_peak
from planner.verification.step_copy import resident_bytes

QUICK = {"costs": "estimate", "progress": False, "check": False}


class Summed(nn.Linear):
    """The input's gradient is expanded, in part."""

    def forward(self, x):
        return super().forward(x.sum(-1, keepdim=True).expand(*x.shape[:-1], 8)).square().mean() + x.mean()


class Passed(nn.Linear):
    """The input's gradient is a view of another one, or another one itself."""

    def forward(self, x):
        return (super().forward(x) + x.transpose(-1, -2).reshape(x.shape)).square().mean() + x.sum()


class Alone(nn.Module):
    """The input's gradient is expanded from a scalar."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x.sum() + self.weight.sum()


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
    "summed": lambda: Summed(8, 8),
    "passed": lambda: Passed(8, 8),
    "alone": Alone,
}
LAYOUTS = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.transpose(1, 2),
    "sliced": lambda base: base[:, ::2],
    "expanded": lambda base: base[:1].expand(4, 8, 8),
}


def inputs(layout, is_leaf):
    """The tensor that gradients arrive at, and the model's input."""
    torch.manual_seed(1)
    base = torch.randn(4, 8, 8)
    if is_leaf:
        base = LAYOUTS[layout](base).requires_grad_()
        return base, base
    base.requires_grad_()
    return base, LAYOUTS[layout](base * 1).sigmoid() if layout == "transposed" else LAYOUTS[layout](base * 1)


def step(model, layout, is_leaf):
    model.zero_grad()
    base, x = inputs(layout, is_leaf)
    seen = []
    x.register_hook(lambda gradient: seen.append((gradient.stride(), gradient.clone())))
    out = model(x)
    out.square().sum().backward()
    ((strides, gradient),) = seen
    return [*(strides if not is_leaf else x.grad.stride()), gradient, base.grad, *(p.grad for p in model.parameters())]


def same(found, expected):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, expected, strict=True))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_they_have_eagers_strides_and_the_peak_is_as_predicted(name, layout, is_leaf):
    torch.manual_seed(0)
    model = MODELS[name]()
    planned = plan(copy.deepcopy(model), 1.0, (inputs(layout, is_leaf)[1],), **QUICK)
    assert same(step(planned, layout, is_leaf), step(model, layout, is_leaf))
    assert (planned.num_planned_calls, planned.num_unplanned_calls) == (1, 0)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("is_leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::planner.MismatchWarning")
def test_planned_for_one_and_called_with_the_other(name, is_leaf):
    torch.manual_seed(0)
    model = MODELS[name]()
    for layout in ("contiguous", "transposed"):
        planned = plan(copy.deepcopy(model), 1.0, (inputs(layout, not is_leaf)[1],), **QUICK)
        assert same(step(planned, layout, is_leaf), step(model, layout, is_leaf))


def test_where_it_matters_the_other_one_is_named():
    model = MODELS["linear"]()
    planned = plan(model, 1.0, (inputs("transposed", True)[1],), **QUICK)
    with pytest.warns(MismatchWarning, match="input 0 is computed by an earlier step, planned for a leaf"):
        step(planned, "transposed", False)
    step(plan(model, 1.0, (inputs("contiguous", True)[1],), strict=True, **QUICK), "contiguous", False)


def test_the_copy_of_a_leafs_gradient_counts():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh()), torch.randn(16, 64, 32).transpose(1, 2).requires_grad_()
    planned = plan(model, 1.0, (x,), **QUICK)

    def run():
        planned(x).sum().backward()

    run()
    planned.zero_grad(set_to_none=True)
    x.grad = None
    assert logical_peak(run, torch.device("cpu")) + resident_bytes(planned) <= planned.plan.peak_bytes
