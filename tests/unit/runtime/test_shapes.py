"""plan(..., dynamic=True): one plan for inputs of every size up to the planned one."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from examples import gpt2
from planner import MismatchError, MismatchWarning, install, plan
from planner.profiler.memory import logical_peak
from tests.support import models
from tests.support.training import assert_same, trajectory


@pytest.fixture(scope="module")
def made():
    model, args, kwargs = gpt2.build(layers=2, width=32, heads=2, length=24, vocabulary=64, batch=4)
    return plan(model, 0.75, args, kwargs, costs="estimate", progress=False, dynamic=True), kwargs


def smaller(kwargs, batch, length):
    less = {id(tensor): tensor[:batch, :length].contiguous() for tensor in kwargs.values()}
    return {name: less[id(tensor)] for name, tensor in kwargs.items()}  # the labels are the tokens here too


@pytest.mark.parametrize(("batch", "length"), [(4, 24), (2, 24), (4, 9), (3, 5)])
def test_smaller_calls_run_planned_exactly_and_within_the_budget(made, batch, length):
    module, kwargs = made
    kwargs = smaller(kwargs, batch, length)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        expected = trajectory(copy.deepcopy(module.original), (), kwargs, accumulate=2)
        assert_same(expected, trajectory(copy.deepcopy(module), (), kwargs, accumulate=2))
        module(**kwargs).loss.backward()  # the capture of a new shape is no part of a step
        module.zero_grad()
        above = logical_peak(lambda: module(**kwargs).loss.backward(), module.device)
    module.zero_grad()
    resident = sum(module.plan.graph.value[name].nbytes for name in module.plan.graph.inputs)
    assert above + resident <= module.plan.budget_bytes


def test_a_shape_is_captured_once(made, monkeypatch):
    module, kwargs = copy.deepcopy(made[0]), smaller(made[1], 2, 7)
    module(**kwargs)
    monkeypatch.setattr("planner.runtime.other_sizes.capture", lambda *_, **__: pytest.fail("captured again"))
    module(**kwargs).loss.backward()


def test_larger_calls_run_unplanned_and_say_so(made):
    module, kwargs = copy.deepcopy(made[0]), {name: made[1]["input_ids"].repeat(2, 1) for name in made[1]}
    with pytest.warns(MismatchWarning, match="this dynamic plan covers up to"):
        module(**kwargs).loss.backward()
    module.strict = True
    with pytest.raises(MismatchError, match=r"input \d is \[8, 24\]; this dynamic plan covers up to \[4, 24\]"):
        module(**kwargs)


class Alternates(nn.Module):
    """A small batch goes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh().sum() if len(x) > 2 else self.layer(x).sum()


def test_a_size_at_which_the_graph_is_another_one_runs_unplanned():
    module = plan(Alternates(), 1.0, (torch.randn(4, 8),), costs="estimate", progress=False, dynamic=True)
    x = torch.randn(2, 8)
    with pytest.warns(MismatchWarning, match="its graph is another one: op tanh .* where the model has aten.sum"):
        out = module(x)
    assert torch.equal(out, module.original(x))


def test_copies_pickles_and_installed_models_hold_for_smaller_calls_too():
    model, args, kwargs = models.build("attention")
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False, dynamic=True)
    less = tuple(tensor[:, :-1] for tensor in args), {name: tensor[:, :-1] for name, tensor in kwargs.items()}
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    installed = copy.deepcopy(model)
    install(installed, plan(installed, 1.0, args, kwargs, costs="estimate", progress=False, dynamic=True))
    expected = trajectory(copy.deepcopy(model), *less)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        for twin in (*twins, installed):
            assert_same(expected, trajectory(twin, *less))
