"""The strongest property: any random valid schedule of a real model trains bit-exactly. No solver involved."""

import copy
import random

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from planner import plan
from planner.errors import ScheduleError
from planner.graph.graph import Kind
from planner.graph.schedule import Schedule, check, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.profiler.measure import measure
from planner.profiler.memory import logical_peak
from planner.results.plan import Plan
from planner.rewriter.partition import partition
from planner.runtime.guards.call_key import call_key
from planner.runtime.module import CheckpointedModule
from planner.runtime.step import RewrittenStep
from planner.tracer.capture import capture
from planner.tracer.lower import backward_is_fixed, kernel_nodes, lower
from tests.support import models
from tests.support.planned import captured, rewritten
from tests.support.strategies import scatter, schedules
from tests.support.training import assert_same, loss_of, trajectory


@pytest.mark.parametrize("name", models.MODELS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_valid_schedule_trains_bit_exactly(name, data):
    _, args, kwargs, _, graph, expected = captured(name)
    schedule = data.draw(schedules(graph))
    event(f"{name}: {'recomputes' if schedule.recomputes() else 'recomputes nothing'}")
    planned = rewritten(name, schedule, num_stages=data.draw(st.integers(1, 6)))
    assert_same(expected, trajectory(planned, args, kwargs))


@pytest.mark.parametrize("name", models.MODELS)
def test_plain_schedule_with_accumulation_is_exact(name):
    model, args, kwargs, _, graph, _ = captured(name)
    expected = trajectory(copy.deepcopy(model), args, kwargs, accumulate=2)
    assert_same(expected, trajectory(rewritten(name, keep_all(graph)), args, kwargs, accumulate=2))


def scaled(name):
    """The same kinds of model with activations large enough for a peak to mean something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "attention":
            return models.Wrapped(torch.nn.Sequential(*(models.Attention(64, 4, 0.1) for _ in range(4)))), (
                torch.randn(4, 64, 64),
            )
        blocks = (models.Residual(16) for _ in range(4))
        return models.Wrapped(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), *blocks)), (torch.randn(4, 3, 34, 34),)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["attention", "convolution"])
@pytest.mark.parametrize("seed", [0, 1])
def test_measured_peak_of_a_random_schedule_is_the_simulated_one(name, seed):
    model, args = scaled(name)
    joint = capture(model, args)
    graph = lower(joint, measure(kernel_nodes(joint), joint.device, progress=False))
    schedule = scatter(graph, random.Random(seed), keep=0.3)
    assert schedule.recomputes()
    key = call_key(list(args), joint)
    plan = Plan(graph, 2**40, 0, Solution("feasible", schedule, 0, 0.0, "test"))
    planned = CheckpointedModule(model, RewrittenStep(joint, partition(joint, graph, schedule), key), plan)

    def step():
        model.zero_grad(set_to_none=True)
        out = planned(*args)
        loss_of(out).backward()  # the outputs are the caller's all the while, as the plan counts them

    step()
    model.zero_grad(set_to_none=True)
    resident = sum(graph.value[name].nbytes for name in graph.inputs if graph.value[name].kind is not Kind.TANGENT)
    measured = logical_peak(step, joint.device) + resident
    predicted = simulate(graph, schedule).peak_bytes
    assert abs(measured - predicted) <= 0.001 * predicted + 8192


class Noise(torch.autograd.Function):
    """Doubles; its gradient is scaled by random numbers drawn in the backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.rand_like(x)


class NoisyBackward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return Noise.apply(self.second(torch.tanh(Noise.apply(self.first(x))))).square().mean()


def test_a_backward_that_draws_random_numbers_keeps_its_order():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, args = NoisyBackward(), (torch.randn(64, 16),)
    joint = capture(model, args)
    graph = lower(joint)
    assert backward_is_fixed(joint)
    expected = trajectory(copy.deepcopy(model), args, {})
    own = copy.deepcopy(model)
    key = call_key(list(args), joint)
    kept = Plan(graph, 2**40, 0, Solution("feasible", keep_all(graph), 0, 0.0, "test"))
    planned = CheckpointedModule(own, RewrittenStep(joint, partition(joint, graph, keep_all(graph)), key), kept)
    assert_same(expected, trajectory(planned, args, {}))

    first, second = (i for i in graph.backward_ops if "rand_like" in graph.ops[i].name)
    steps = list(range(len(graph.ops)))
    steps.remove(second)
    moved = Schedule((*steps[:first], second, *steps[first:]))
    check(graph, moved)
    with pytest.raises(ScheduleError, match=r"runs rand_like after rand_like_1, but .* order must be the captured one"):
        partition(joint, graph, moved)
    assert_same(expected, trajectory(plan(copy.deepcopy(model), 0.9, args, costs="estimate", progress=False), args, {}))


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_several_threads_train_bit_exactly(name):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, args, kwargs, _, graph, _ = captured(name)
        schedule = scatter(graph, random.Random(2), keep=0.3)
        assert schedule.recomputes()
        assert_same(trajectory(copy.deepcopy(model), args, kwargs), trajectory(rewritten(name, schedule), args, kwargs))
    finally:
        torch.set_num_threads(before)
