"""Units that a step calls several times: siamese towers, shared layers, contrastive losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import InputError, UnitPlan, apply_units, plan_units
from planner.profiler.memory import logical_peak
from tests.support.training import assert_same, trajectory

QUICK = {"costs": "estimate", "effort": 0.5, "progress": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow, self.drop = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.narrow(F.gelu(self.wide(self.norm(x)))))


class Siamese(nn.Module):
    """One tower, called for each of two inputs; the pairs that count are picked by value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(3))

    def tower(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        left, right = self.tower(x), self.tower(x.flip(0))
        apart = (left - right).square().sum(-1)
        return apart[apart > apart.median()].mean() + left.square().mean()


class Shared(nn.Module):
    """One block, called again and again on what it returned (ALBERT); the second of two is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 16), nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.embed(x)
        for _ in range(3):
            x = self.blocks[0](x)
        x = self.blocks[1](x)
        return x[x.sum(-1) > 0].square().mean()


class Reused(nn.Module):
    """A block that uses its weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.weight) @ self.weight.T)


def measured(model, args) -> int:
    def step() -> None:
        model(*args).backward()

    step()
    model.zero_grad(set_to_none=True)
    resident = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *args))
    return resident + logical_peak(step, torch.device("cpu"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", [Siamese, Shared])
@pytest.mark.parametrize("num_stages", [1, 4])
def test_each_call_counts_and_bits_are_equal(kind, num_stages, tmp_path):
    torch.manual_seed(0)
    model, args = kind(), (torch.randn(64, 8),)
    expected = trajectory(copy.deepcopy(model), args, {})
    found = plan_units(model, 0.75, args, num_stages=num_stages, **QUICK)
    assert {name for name in found.planned if name.startswith("blocks.")} == {f"blocks.{i}" for i in range(len(model.blocks))}
    assert len(found.plan.outer.calls) == {Siamese: 6, Shared: 4}[kind]
    assert found.plan.recompute_ns > 0
    assert found.peak_bytes <= found.budget_bytes < found.plain_bytes
    assert measured(copy.deepcopy(model), args) == found.peak_bytes
    assert_same(expected, trajectory(model, args, {}))
    assert found.verify(args).exact
    found.save(tmp_path / "units.json")
    again = apply_units(UnitPlan.load(tmp_path / "units.json"), kind(), args, num_stages=num_stages, progress=False)
    assert str(again.plan) == str(found.plan)


@pytest.mark.parametrize("kind", [Siamese, Shared])
def test_the_simulated_peak_is_the_measured_one(kind):
    torch.manual_seed(0)
    found = plan_units(kind(), 0.75, (torch.randn(64, 8),), **QUICK)
    assert found.plan.measured_bytes <= found.plan.peak_bytes <= found.plan.measured_bytes * 1.1


@pytest.mark.parametrize("kind", [Siamese, Shared])
def test_gradients_are_accumulated_over_calls_and_steps(kind):
    torch.manual_seed(0)
    model, args = kind(), (torch.randn(64, 8),)
    plain = copy.deepcopy(model)
    found = plan_units(model, 0.95, args, accumulate=True, **QUICK)
    for net in (plain, model):
        torch.manual_seed(1)
        for _ in range(2):
            net(*args).backward()
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in model.parameters()])
    assert found.peak_bytes <= found.budget_bytes


class Numbered(nn.Module):
    """Names with a number sign: of the second block, not of the first one's second call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        for name in ("b", "b#1", "b (call 2)"):
            self.add_module(name, Block())

    def forward(self, x):
        x = self.embed(x)
        for name in ("b", "b#1", "b", "b (call 2)"):
            x = getattr(self, name)(x)
        return x[x.sum(-1) > 0].square().mean()


def test_names_of_units_are_not_read_as_calls(tmp_path):
    torch.manual_seed(0)
    model, args = Numbered(), (torch.randn(64, 8),)
    expected = trajectory(copy.deepcopy(model), args, {})
    found = plan_units(model, 0.85, args, units=Block, **QUICK)
    assert {name: sum(call.unit == name for call in found.plan.outer.calls) for name in found.planned} == {
        "b": 2,
        "b#1": 1,
        "b (call 2)": 1,
    }
    assert_same(expected, trajectory(model, args, {}))
    found.save(tmp_path / "units.json")
    assert UnitPlan.load(tmp_path / "units.json") == found.plan


def test_calls_that_share_a_cast_are_no_unit():
    model, args = Siamese(), (torch.randn(64, 8),)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="2 times in a step, and autocast casts its"):
        plan_units(model, 0.9, args, units="blocks.0", **QUICK)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert set(plan_units(model, 0.9, args, units="blocks.0", **QUICK).planned) == {"blocks.0"}


def test_a_block_around_one_that_uses_its_weight_twice():
    torch.manual_seed(0)
    model, args = Siamese(), (torch.randn(64, 8),)
    model.blocks[1] = Reused()
    expected = trajectory(copy.deepcopy(model), args, {})
    found = plan_units(model, 0.95, args, units=["blocks.0", "blocks.2"], **QUICK)
    assert_same(expected, trajectory(model, args, {}))
    found.uninstall()


def test_a_weight_used_several_times_in_each_call_keeps_its_order():
    torch.manual_seed(0)
    model, args = Siamese(), (torch.randn(64, 8),)
    model.blocks[1] = Reused()
    expected = trajectory(copy.deepcopy(model), args, {})
    assert set(plan_units(model, 1.0, args, units=["blocks.1"], **QUICK).planned) == {"blocks.1"}
    assert_same(expected, trajectory(model, args, {}))


class Doubled(torch.autograd.Function):
    """Written in Python: what it returns for its two uses of the weight is one sum already."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class ReusedByFunctions(Reused):
    def forward(self, x):
        return torch.tanh(Doubled.apply(torch.tanh(Doubled.apply(x, self.weight)), self.weight.T))


def test_a_weight_whose_terms_cannot_be_told_apart_makes_no_unit_of_several_calls():
    torch.manual_seed(0)
    model, args = Siamese(), (torch.randn(64, 8),)
    model.blocks[1] = ReusedByFunctions()
    expected = trajectory(copy.deepcopy(model), args, {})
    with pytest.raises(InputError, match="2 times in a step, and uses its weight several times in each"):
        plan_units(model, 1.0, args, units=["blocks.1"], **QUICK)
    assert_same(expected, trajectory(model, args, {}))
