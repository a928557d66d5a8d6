"""plan_units and apply_units: what is checked before the work, and what units share."""

import copy

import pytest
import torch
from torch import fx, nn

from planner import CompileError, InputError, apply_units, plan_units, unplan
from planner._compat.fx_graphs import box
from planner.composite import units as under_test
from planner.composite.trial import Trial
from planner.rewriter import compiled
from tests.support.training import assert_same, trajectory


def test_a_fraction_of_an_unknown_peak_is_refused_before_anything_is_captured(monkeypatch):
    monkeypatch.setattr(Trial, "peak", lambda *_: None)  # as where the plain step does not fit on the device
    monkeypatch.setattr(under_test, "kinds_of", None)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    with pytest.raises(InputError, match="a fraction of it is unknown: give bytes"):
        plan_units(model, 0.5, (torch.randn(2, 4),), progress=False)


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.wide(x)))


def blocks(depth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*(Block() for _ in range(depth))), Mean()).train()
    return model, (torch.randn(64, 8),)


QUICK = {"costs": "estimate", "effort": 0.3, "progress": False}


class Compiler:
    """In place of inductor: the same graph, kernel by kernel. `extra`: a tensor that it holds while it runs."""

    def __init__(self, extra=0):
        self.num_calls, self.extra = 0, extra

    def __call__(self, graph, examples):
        self.num_calls += 1
        box(graph)
        run = fx.GraphModule({}, graph).forward

        def beside_a_tensor(given):
            held = torch.zeros(self.extra)
            return run(given)[: len(held)]

        return beside_a_tensor if self.extra else run


def test_equal_units_that_run_alike_are_compiled_once(monkeypatch, tmp_path):
    counts = []
    for depth in (2, 6):
        monkeypatch.setattr(compiled, "compile_boxed", compiler := Compiler())
        model, call = blocks(depth)
        expected = trajectory(copy.deepcopy(model), call, {})
        planned = plan_units(model, 1.0, call, compile=True, **QUICK)
        assert len(planned.planned) == depth and len({id(unit.executable) for unit in planned.planned.values()}) == 1
        assert planned.plan.measured_bytes <= planned.plan.budget_bytes
        assert_same(expected, trajectory(model, call, {}))
        counts.append(compiler.num_calls)
        planned.plan.save(tmp_path / "units.json")
        unplan(model)
        applied = apply_units(tmp_path / "units.json", model, call, compile=True, progress=False)
        assert len({id(unit.executable) for unit in applied.planned.values()}) == 1
        assert compiler.num_calls == 2 * counts[-1]
    assert counts[0] == counts[1] > 0


def test_a_compiled_step_that_needs_more_than_the_budget_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled, "compile_boxed", Compiler(extra=10**6))
    model, call = blocks(2)
    with pytest.raises(CompileError, match=r"compiled, the step peaks at .* Plan without compile=True"):
        plan_units(model, 0.9, call, compile=True, **QUICK)
