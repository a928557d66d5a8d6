"""Forwards that wait for their backwards, more of them than a plan counts: said once, where the budget may not hold them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import CheckpointedModule, apply_units, install, plan, plan_at_first_call, plan_units
from planner.profiler.memory import logical_peak

QUICK = {"costs": "estimate", "effort": 0.5, "progress": False}
WORDS = r"{} forwards wait for their backwards, and its plan counts {}\. This step may need .* more than its budget"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow, self.drop = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.narrow(F.gelu(self.wide(self.norm(x)))))


class Looped(nn.Module):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last, self.times = nn.Linear(8, 16), Block(), nn.Linear(16, 1), 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(self.times):
            h = self.block(h)
        return self.last(h).sum()


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 1), nn.Flatten(0)), torch.randn(64, 8)


def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x).square().sum()


def step(module: nn.Module, x: torch.Tensor, count: int) -> None:
    losses = [loss(module, x) for _ in range(count)]
    for one in losses:
        one.backward()
    module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("counted", [1, 2])
def test_one_more_than_counted_is_said_once_and_the_number_that_helps_is_right(counted: int) -> None:
    model, x = net()
    planned = plan(model, 1.0, (x,), in_flight=counted, **QUICK)
    step(planned, x, counted)
    with pytest.warns(UserWarning, match=rf"in_flight={counted + 1}\): " + WORDS.format(counted + 1, counted)):
        step(planned, x, counted + 1)
    step(planned, x, counted + 2)  # warnings are errors

    enough = plan(model, 1.0, (x,), in_flight=counted + 1, **QUICK)
    step(enough, x, counted + 1)
    peak = logical_peak(lambda: step(enough, x, counted + 1), x.device) + enough.plan.graph.resident_bytes
    assert peak <= enough.plan.budget_bytes


def test_what_the_budget_holds_beside_the_step_is_no_matter() -> None:
    model, x = net()
    made = plan(model, 1.0, (x,), **QUICK).plan
    step(plan(model, made.peak_bytes + made.saved_bytes, (x,), **QUICK), x, 2)
    step(plan(model, made.peak_bytes + made.saved_bytes, (x,), reserve=made.saved_bytes, **QUICK), x, 2)
    with pytest.warns(UserWarning, match=WORDS.format(3, 1)):
        step(plan(model, made.peak_bytes + made.saved_bytes, (x,), **QUICK), x, 3)


def test_a_loss_that_is_kept_after_its_backward_holds_nothing() -> None:
    model, x = net()
    planned, kept = plan(model, 1.0, (x,), **QUICK), []
    for _ in range(3):
        kept.append(loss(planned, x))
        kept[-1].backward()
        planned.zero_grad(set_to_none=True)
    loss(planned, x)  # and one that nobody keeps
    step(planned, x, 1)


def test_a_graph_that_is_retained_still_waits() -> None:
    model, x = net()
    planned = plan(model, 1.0, (x,), **QUICK)
    first = loss(planned, x)
    first.backward(retain_graph=True)
    planned.zero_grad(set_to_none=True)
    with pytest.warns(UserWarning, match=WORDS.format(2, 1)):
        second = loss(planned, x)
    for one in (first, second):
        one.backward()


def _other_size(planned: CheckpointedModule, x: torch.Tensor) -> torch.Tensor:
    return loss(planned, x[:48])


def _other_kind(planned: CheckpointedModule, x: torch.Tensor) -> torch.Tensor:
    return loss(planned, x.clone().requires_grad_())


@pytest.mark.parametrize("other", [_other_size, _other_kind])
def test_forwards_of_other_sizes_and_kinds_wait_beside_it(other) -> None:
    model, x = net()
    also = [((x.clone().requires_grad_(),), {})] if other is _other_kind else []
    planned = plan(model, 1.0, (x,), dynamic=not also, also=also, **QUICK)
    other(planned, x).backward()  # captured
    planned.zero_grad(set_to_none=True)
    first = other(planned, x)
    with pytest.warns(UserWarning, match=WORDS.format(2, 1)):
        second = loss(planned, x)
    first.backward()
    second.backward()


def test_forwards_of_plans_that_are_installed_together_wait_beside_each_other() -> None:
    model, x = net()
    plans = [plan(model, 1.0, (rows,), **QUICK) for rows in (x, x.clone().requires_grad_())]
    install(model, *plans)
    first = loss(model, x)
    with pytest.warns(UserWarning, match=WORDS.format(2, 1)):
        second = loss(model, x.clone().requires_grad_())
    first.backward()
    second.backward()


@pytest.mark.parametrize("applied", [False, True])
def test_a_unit_that_is_called_more_often_than_planned(applied: bool) -> None:
    torch.manual_seed(0)
    model, x = Looped(), torch.randn(64, 8)
    units = plan_units(model, 0.8, (x,), units="block", **QUICK)
    if applied:
        units = apply_units(units.plan, model, (x,), progress=False)
    copied = copy.deepcopy(model)
    for times in (3, 1, 3):
        for one in (model, copied):
            one.times = times
            one(x).backward()
            one.zero_grad(set_to_none=True)
    for one in (model, copied):
        one.times = 4
        with pytest.warns(UserWarning, match="plan the units again, .*: " + WORDS.format(4, 3)):
            one(x).backward()
        one.zero_grad(set_to_none=True)
        one(x).backward()  # warnings are errors
    assert not units.planned["block"].num_unplanned_calls


class Alternates(nn.Module):
    """A small batch goes another way, so that it has a plan of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h.tanh().sum() if len(x) > 2 else h.square().sum()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Python's own garbage collection is off: what is gone now was held by nothing."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def is_held(module: nn.Module, x: torch.Tensor) -> bool:
    """A call's output, which nobody keeps, is still there, and with it its graph."""
    out = weakref.ref(module(x))
    return out() is not None


@pytest.mark.parametrize("rows", [2, 3])
def test_a_call_that_is_planned_as_it_comes_is_not_held(rows: int, no_collection: None) -> None:
    planned = plan(Alternates(), 1.0, (torch.randn(4, 8),), dynamic=True, **QUICK)
    for _ in range(2):
        assert not is_held(planned, torch.randn(rows, 8))


@pytest.mark.parametrize("budget", [1.0, "1KiB"])
@pytest.mark.filterwarnings("ignore:.*trains unplanned")
def test_a_first_call_is_not_held(budget: float | str, no_collection: None) -> None:
    model, x = net()
    plan_at_first_call(model, budget, log=lambda table: None, **QUICK)
    for _ in range(2):
        assert not is_held(model, x)


def test_a_backward_that_is_captured_as_it_comes_is_not_held(no_collection: None) -> None:
    model, x = net()
    planned = plan(model, 1.0, (x,), **QUICK)
    for _ in range(2):
        gradient = torch.ones(128)[::2]  # of another layout than planned
        held = weakref.ref(gradient)
        out = planned(x)
        out.backward(gradient)
        del gradient, out
        assert held() is None


def test_a_forward_that_fails_does_not_wait() -> None:
    class Inverts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x * self.scale).square().sum()

    x = torch.eye(8) + 0.1
    planned = plan(Inverts(), 1.0, (x,), **QUICK)
    with pytest.raises(torch.linalg.LinAlgError) as failed:  # holds the frames of the call
        planned(torch.zeros(8, 8))
    planned(x).backward()
    assert failed.value is not None
