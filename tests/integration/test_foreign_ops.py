"""Operators from outside of torch: recomputed only where a second run was seen to repeat the first and to change nothing."""

from __future__ import annotations

import copy
import itertools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from planner import BackwardError, CaptureError, InfeasibleBudgetError, MismatchWarning, NoScheduleFoundError, plan
from planner.tracer.lower import backward_is_fixed, lower
from planner.tracer.real_layouts import capture
from tests.support.training import assert_same, trajectory

CALLS = {"count": 0, "list": []}
GENERATOR = np.random.default_rng(0)
COUNTER = itertools.count()
names = itertools.count()


class Counting:
    """Counts the calls of its method."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * 2


COUNTING = Counting()


def counted(x):
    CALLS["count"] += 1
    return x * 2


def appended(x):
    CALLS["list"].append(1)
    return x * 2


def late(x):
    """Another result at every tenth call."""
    CALLS["count"] += 1
    return x * (3 if CALLS["count"] % 10 == 0 else 2)


def counted_by_iterator(x):
    next(COUNTER)
    return x * 2


def closed_over():
    calls = 0

    def double(x):
        nonlocal calls
        calls += 1
        return x * 2

    return double


def with_default(x, calls=[]):  # noqa: B006
    calls.append(1)
    return x * 2


BODIES = {
    "plain": (lambda x: x * 2, True, False),
    "two_kernels": (lambda x: torch.tanh(x) + torch.exp(-x.square()), True, False),
    "torch_randn": (lambda x: x + torch.randn_like(x), True, True),
    "torch_dropout": (lambda x: torch.nn.functional.dropout(x, 0.5), True, True),
    "numpy_global": (lambda x: x * torch.from_numpy(np.random.rand(*x.shape)).to(x.dtype), False, False),
    "numpy_unused": (lambda x: (np.random.rand(), x * 2)[1], False, False),
    "numpy_generator": (lambda x: x * float(GENERATOR.random()), False, False),
    "python_random": (lambda x: x * (1 + random.random()), False, False),
    "own_torch_generator": (lambda x: x + torch.randn(x.shape, generator=_TORCH_GENERATOR), False, False),
    "counts_in_a_dict": (counted, False, False),
    "counts_in_a_list": (appended, False, False),
    "counts_in_an_object": (lambda x: COUNTING(x), False, False),
    "counts_in_an_iterator": (counted_by_iterator, False, False),
    "counts_in_a_closure": (closed_over(), False, False),
    "counts_in_a_default": (with_default, False, False),
    "differs_late": (late, False, False),
}
"""What an operator does: its function, whether it may be recomputed, whether it draws from torch's generator."""

_TORCH_GENERATOR = torch.Generator().manual_seed(0)


def operator(body, backward=None):
    """A custom op that runs `body`, without any tag."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        return body(x)

    op = torch.library.custom_op(f"test_foreign::op{next(names)}", kernel, mutates_args=())
    op.register_fake(torch.empty_like)
    op.register_autograd(backward or (lambda ctx, grad: grad * 2))
    return lambda x: op(x)  # copies of a model share it


class Model(nn.Module):
    def __init__(self, op, depth=4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.op = op

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(self.op(torch.tanh(layer(x) * 2)) * 3)
        return x.square().mean()


class Squares(Model):
    """Each call's result is saved for the backward, and its argument too: recomputing the call is the cheapest there is."""

    def forward(self, x):
        for layer in self.layers:
            x = self.op(torch.tanh(layer(x))).square()
        return x.square().mean()


def lowest_plan(model, args, costs="estimate"):
    for budget in (0.5, 0.6, 0.7, 0.8, 0.9):
        try:
            return plan(model, budget, args, costs=costs, progress=False, effort=0.3)
        except (InfeasibleBudgetError, NoScheduleFoundError):
            continue
    return plan(model, 1.0, args, costs="estimate", progress=False)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", BODIES)
def test_what_is_known_of_an_operator(name: str) -> None:
    body, repeatable, draws = BODIES[name]
    model, x = Model(operator(body)), torch.randn(8, 16)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    joint = capture(model, (x,))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    ops = [op for op in lower(joint).ops if op.name.startswith("op")]
    assert len(ops) == 4
    assert all(op.recomputable is repeatable for op in ops)
    assert all((op.name in joint.rng_states) is draws for op in ops)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [name for name, (_, repeatable, _) in BODIES.items() if repeatable])
@pytest.mark.parametrize("costs", ["estimate", "measure"])
def test_repeatable_operators_are_recomputed_and_train_bit_exactly(name: str, costs: str) -> None:
    torch.manual_seed(0)
    model, x = Squares(operator(BODIES[name][0])), torch.randn(4096, 16)
    expected = trajectory(copy.deepcopy(model), (x,), {})
    planned = lowest_plan(copy.deepcopy(model), (x,), costs)
    ops = planned.plan.graph.ops
    schedule = planned.plan.solution.schedule
    assert any(ops[schedule.steps[i]].name.startswith("op") for i in schedule.recomputes())
    assert_same(expected, trajectory(planned, (x,), {}))


def test_an_operator_that_counts_is_called_as_often_as_eager_calls_it() -> None:
    body = Counting()
    model, x = Model(operator(lambda x: body(x))), torch.randn(512, 16)
    planned = lowest_plan(copy.deepcopy(model), (x,))
    assert planned.plan.solution.schedule.recomputes()
    body.calls = 0
    planned(x).backward()
    assert body.calls == 4


def test_a_random_operator_in_the_backward_fixes_its_order() -> None:
    noise = operator(lambda x: x + torch.randn_like(x))
    model, x = Model(operator(lambda x: x * 2, lambda ctx, grad: noise(grad))), torch.randn(512, 16)
    assert backward_is_fixed(capture(model, (x,)))
    expected = trajectory(copy.deepcopy(model), (x,), {})
    assert_same(expected, trajectory(lowest_plan(copy.deepcopy(model), (x,)), (x,), {}))


def test_a_counting_operator_in_the_backward_fixes_its_order() -> None:
    count = operator(counted)
    model = Model(operator(lambda x: x * 2, lambda ctx, grad: count(grad)))
    assert backward_is_fixed(capture(model, (torch.randn(8, 16),)))
    assert not backward_is_fixed(capture(Model(operator(lambda x: x * 2)), (torch.randn(8, 16),)))


def test_an_operator_whose_result_is_not_used_still_runs() -> None:
    body = Counting()
    op = operator(lambda x: body(x))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            x = self.layer(x)
            op(x.detach())
            return x.square().mean()

    planned = plan(Unused(), 1.0, (torch.randn(8, 16),), costs="estimate", progress=False)
    body.calls = 0
    planned(torch.randn(8, 16))
    assert body.calls == 1


def test_an_operator_that_writes_into_its_argument_without_saying_so() -> None:
    class Writing(nn.Module):
        def __init__(self, op) -> None:
            super().__init__()
            self.op = op

        def forward(self, x):
            return self.op(x * 0.5)

    op = operator(lambda x: x.add_(1) * 2)
    model, x = nn.Sequential(nn.Linear(16, 16), Writing(op), nn.Linear(16, 16), nn.Tanh()), torch.randn(64, 16)
    expected = trajectory(copy.deepcopy(model).append(Mean()), (x,), {})
    planned = lowest_plan(copy.deepcopy(model).append(Mean()), (x,))
    assert planned.plan.provenance.opaque == ("1",)
    assert_same(expected, trajectory(planned, (x,), {}))
    with pytest.raises(CaptureError, match="writes into an argument, which its schema does not say"):
        plan(Trained(op), 1.0, (x,), costs="estimate", progress=False)


class Trained(nn.Module):
    """The operator in the model's own forward."""

    def __init__(self, op) -> None:
        super().__init__()
        self.weight, self.op = nn.Parameter(torch.ones(16)), op

    def forward(self, x):
        return self.op(x + self.weight).square().mean()


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


def test_an_operator_that_says_it_writes() -> None:
    @torch.library.custom_op("test_foreign::written", mutates_args=("out",))
    def written(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    written.register_fake(lambda x, out: None)

    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(16))

        def forward(self, x):
            written(x.detach().mean(0), self.last)
            return x + self.last

    model = nn.Sequential(nn.Linear(16, 16), Noted(), nn.Linear(16, 16), Mean())
    x = torch.randn(64, 16)
    expected = trajectory(copy.deepcopy(model), (x,), {})
    assert_same(expected, trajectory(lowest_plan(copy.deepcopy(model), (x,)), (x,), {}))


def test_an_operator_that_cannot_be_run_on_made_up_inputs_is_kept() -> None:
    def checked(x):
        if x.min() > 0:
            raise ValueError("made-up inputs are positive")
        return x * 2

    model, x = Model(operator(checked)), torch.randn(512, 16)
    assert not any(op.recomputable for op in lower(capture(model, (x,))).ops if op.name.startswith("op"))
    expected = trajectory(copy.deepcopy(model), (x,), {})
    assert_same(expected, trajectory(lowest_plan(copy.deepcopy(model), (x,)), (x,), {}))


SETTING = types.SimpleNamespace(factor=2.0)


def test_state_that_the_backward_of_an_operator_reads_is_compared(monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = Model(operator(lambda x: x * 2, lambda ctx, grad: grad * SETTING.factor), depth=2), torch.randn(8, 16)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    planned(x).backward()
    assert planned.num_planned_calls == 1
    loss = planned(x)
    monkeypatch.setattr(SETTING, "factor", 3.0)
    with pytest.raises(BackwardError, match=r"SETTING.factor is 3\.0, and was 2\.0"):
        loss.backward()
    with pytest.warns(MismatchWarning, match=r"SETTING.factor is 3\.0, planned for 2\.0"):
        planned(x).backward()
