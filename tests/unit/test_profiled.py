"""profile: one capture, from which plans, sweeps and explanations are made."""

import copy

import pytest
import torch
from torch import nn

import planner
from planner import (
    CheckpointedModule,
    InfeasibleBudgetError,
    InputError,
    NoScheduleFoundError,
    PlanFileError,
    ProfiledStep,
    captured,
    profile,
)
from planner.errors import BudgetError

QUICK = {"costs": "estimate", "progress": False, "effort": 0.5}
X = torch.randn(256, 64)


def net(num=5):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(num)]
    return nn.Sequential(*blocks, nn.Linear(64, 1))


def trained(module):
    """Loss, gradients, buffers and random state after two steps."""
    torch.manual_seed(1)
    losses = [module(X).square().mean() for _ in range(2)]
    for loss in losses:
        loss.backward()
    state = {name: parameter.grad for name, parameter in module.named_parameters()} | dict(module.named_buffers())
    return [*losses, *(state[name] for name in sorted(state)), torch.get_rng_state()]


def assert_equal_bits(one, other):
    assert len(one) == len(other) > 10
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def captures(monkeypatch):
    seen, capture = [], captured.capture
    monkeypatch.setattr(captured, "capture", lambda *args, **kwargs: (seen.append(args), capture(*args, **kwargs))[1])
    return seen


def test_one_capture_serves_plans_sweeps_and_explanations(captures):
    model = net()
    step = profile(model, (X,), **QUICK)
    assert isinstance(step, ProfiledStep) and step.model is model
    planned = step.plan(0.7)
    swept = step.sweep(points=3)
    applied = [step.apply(swept.plan(point)) for point in swept.points]
    explained = step.explain(0.7)
    assert len(captures) == 1
    assert explained.plan.solution.schedule == planned.plan.solution.schedule
    assert all(isinstance(module, CheckpointedModule) and module.original is model for module in (planned, *applied))
    assert [module.plan.budget_bytes for module in applied] == [point.budget_bytes for point in swept.points]
    assert applied[0].plan.peak_bytes < applied[-1].plan.peak_bytes
    assert all(module.plan.check == "run" for module in applied)


@pytest.mark.filterwarnings("ignore:.*forwards wait")
def test_bits_equal_those_of_plan_and_of_the_model():
    plain, one, other, third = net(), net(), net(), net()
    step = profile(other, (X,), **QUICK)
    by_plan, by_step = planner.plan(one, 0.7, (X,), **QUICK), step.plan(0.7)
    assert by_step.plan.solution.schedule == by_plan.plan.solution.schedule and by_plan.plan.solution.schedule.recomputes()
    assert by_step.plan.budget_bytes == by_plan.plan.budget_bytes and by_step.code == by_plan.code
    from_sweep = profile(third, (X,), **QUICK)
    knee = from_sweep.apply(from_sweep.sweep(points=4).knee)
    assert knee.plan.solution.schedule.recomputes()
    expected = trained(plain)
    for module in (by_plan, by_step, knee):
        assert_equal_bits(trained(module), expected)


def test_sweep_is_that_of_the_step():
    one, other = planner.sweep(net(), [0.8, 0.9], (X,), **QUICK), profile(net(), (X,), **QUICK).sweep([0.8, 0.9])
    assert one.points and [p.solution.schedule for p in one.points] == [p.solution.schedule for p in other.points]
    measured = other.verify(1, rounds=1).measured
    assert len(measured) == 1 and measured[0].exact


def test_other_calls_are_captured_once_each(captures):
    planned = profile(net(), (X,), also=[((X[:64],), {}), ((X[:32],), {})], **QUICK).plan(0.9)
    assert len(captures) == 3 and len(planned.alternatives) == 2
    assert {module.plan.budget_bytes for module in planned.alternatives} == {planned.plan.budget_bytes}


def test_options_of_the_planned_module_are_kept():
    step = profile(net(), (X,), strict=True, check=False, audit=False, num_stages=3, **QUICK)
    for module in (step.plan(0.8), step.apply(step.sweep([0.8]).knee)):
        assert module.strict and module.step.num_stages == 3
        assert "check=False" in module.plan.check


def test_a_criterion_is_part_of_the_step(captures):
    y = torch.randn(256, 1)
    step = profile(net(), (X,), criterion=nn.functional.mse_loss, criterion_args=(y,), **QUICK)
    loss, output = step.apply(step.sweep([0.9]).knee)(X, criterion_args=(y,))
    assert loss.shape == () and output.shape == (256, 1) and len(captures) == 1


def test_a_plan_of_another_model_is_refused():
    step = profile(net(), (X,), **QUICK)
    with pytest.raises(PlanFileError, match="another model or call"):
        step.apply(planner.plan(net(4), 1.0, (X,), **QUICK).plan)
    with pytest.raises(InputError, match=r"module\.plan"):
        step.apply(step.plan(1.0))


def test_a_step_of_a_device_that_is_not_here_runs_nothing():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)), torch.empty(64, 32)
    step = profile(model, (x,), device="H100", progress=False)
    assert "not here" in step.plan(1.0).plan.check and "not here" in step.apply(step.plan(1.0).plan).plan.check
    with pytest.raises(InputError, match="no model to run"):
        step.sweep(points=1).verify()
    with pytest.raises(BudgetError, match=r"80\.00 GiB that H100-80GB has"):
        step.plan("81GiB")


@pytest.mark.parametrize("method", ["plan", "explain"])
def test_a_budget_that_is_too_small_carries_the_floor(method):
    step = profile(net(), (X,), **QUICK)
    with pytest.raises(InfeasibleBudgetError, match=r"budget 0\.1 of the plain step's peak") as caught:
        getattr(step, method)(0.1)
    assert 0 < caught.value.budget_bytes < caught.value.floor_bytes
    for wrong in ("much", -1, None):
        with pytest.raises(BudgetError):
            getattr(step, method)(wrong)


def test_the_lowest_peak_found_is_a_field_of_the_error():
    swept = profile(net(), (X,), **QUICK).sweep([0.9, 1.0])
    with pytest.raises(NoScheduleFoundError) as caught:
        swept.best(budget=swept.floor_bytes + 1)
    assert caught.value.lowest_bytes == min(point.peak_bytes for point in swept.points)
    assert caught.value.floor_bytes == swept.floor_bytes


def test_the_step_keeps_the_call_as_it_was():
    model, x = net(), X.clone()
    before = copy.deepcopy(model.state_dict())
    step = profile(model, (x,), **QUICK)
    step.plan(0.8)
    assert torch.equal(x, X) and step.args[0] is x and step.kwargs == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_values_and_provenance_say_what_they_are():
    step = profile(net(2), (X,), **QUICK)
    forms = {value.form for value in step.graph.values}
    assert {"float32[256, 64]", "float32[64, 64]", "float32[64]", "float32[256, 1]"} <= forms
    assert step.provenance.module == "Sequential"
    value = next(value for value in step.graph.values if value.form == "float32[256, 64]")
    assert value.nbytes >= 4 * 256 * 64
