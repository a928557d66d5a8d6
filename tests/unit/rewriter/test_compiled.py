"""compile=True: the planned halves compiled by inductor; results equal but for rounding, draws and peak as planned."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from planner import CheckpointedModule, CompileError, InputError, Plan, apply, install, plan, verify
from planner._compat.fx_graphs import box
from planner._compat.inductor import compile_boxed
from planner.rewriter import compiled
from tests.support import models
from tests.support.text import unwrapped
from tests.support.training import assert_same, trajectory

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def as_eager(graph, examples):
    """In place of inductor: the same piece, kernel by kernel."""
    box(graph)
    return fx.GraphModule({}, graph).forward


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gru, self.last = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.gru(nn.functional.dropout(self.first(x).relu(), 0.3))[0])).square().mean()


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "compile_boxed", as_eager)


@pytest.mark.parametrize("name", ["mlp", "attention", "convolution", "skips", "tied"])
def test_pieces_run_as_the_whole_does_bit_for_bit_and_within_its_peak(uncompiled, name):
    model, args, kwargs = models.build(name)
    planned = plan(model, 0.9, args, kwargs, costs="estimate", progress=False)
    pieced = CheckpointedModule(model, replace(planned.step, is_compiled=True), planned.plan)
    assert_same(trajectory(copy.deepcopy(planned), args, kwargs), trajectory(copy.deepcopy(pieced), args, kwargs))
    report, whole = verify(pieced, args, kwargs, rounds=1), verify(planned, args, kwargs, rounds=1)
    assert report.exact and report.largest_difference == 0
    assert report.measured_peak_bytes <= whole.measured_peak_bytes
    assert pieced._executable.forward.num_compiled > 0


def test_opaque_parts_and_draws_run_as_they_are(uncompiled):
    model, x = Recurrent().train(), torch.randn(4, 6, 8)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    pieced = CheckpointedModule(model, replace(planned.step, is_compiled=True), planned.plan)
    assert_same(trajectory(copy.deepcopy(planned), (x,), {}), trajectory(copy.deepcopy(pieced), (x,), {}))
    assert pieced._executable.forward.num_compiled == 3  # before the draws, up to the GRU, after it


def test_a_copy_shares_the_compiled_code(uncompiled, monkeypatch):
    model, args, kwargs = models.build("mlp")
    planned = plan(model, 1.0, args, kwargs, costs="estimate", progress=False, compile=True)
    monkeypatch.setattr(compiled, "compile_boxed", None)
    twin = copy.deepcopy(planned)
    assert_same(trajectory(copy.deepcopy(planned), args, kwargs), trajectory(twin, args, kwargs))
    owner = copy.deepcopy(planned).original
    install(owner, CheckpointedModule(owner, planned.step, planned.plan, executable=planned.executable), strict=True)
    assert_same(trajectory(copy.deepcopy(planned), args, kwargs), trajectory(copy.deepcopy(owner), args, kwargs))
    monkeypatch.setattr(compiled, "compile_boxed", as_eager)
    again = pickle.loads(pickle.dumps(planned))
    assert again.step.is_compiled
    assert_same(trajectory(copy.deepcopy(planned), args, kwargs), trajectory(again, args, kwargs))


def test_what_inductor_says_is_passed_on(monkeypatch):
    def fail(graph, examples):
        raise RuntimeError("no compiler here\nadvice")

    model, args, kwargs = models.build("mlp")
    monkeypatch.setattr(compiled, "compile_boxed", fail)
    with pytest.raises(CompileError, match=r"RuntimeError: no compiler here. Plan without compile=True"):
        plan(model, 1.0, args, kwargs, costs="estimate", progress=False, compile=True)
    assert "forward" not in vars(model) and all(p.grad is None for p in model.parameters())


def test_a_step_that_needs_more_than_planned_is_planned_for_less_or_refused(uncompiled, monkeypatch):
    model, args, kwargs = models.build("attention")
    plain = plan(model, 1.0, args, kwargs, costs="estimate", progress=False).plan.peak_bytes
    budget, asked = int(0.9 * plain), []

    def peaks(extra_bytes):
        def step(planned, args, kwargs):
            asked.append(planned.plan.peak_bytes)
            return planned.plan.peak_bytes + extra_bytes

        return step

    monkeypatch.setattr("planner.verification.measured.step_peak", peaks(plain // 60))
    found = plan(model, budget, args, kwargs, costs="estimate", progress=False, compile=True)
    assert found.plan.budget_bytes == budget and found.plan.peak_bytes + plain // 60 <= budget
    assert 1 < len(asked) <= 3 and asked[0] + plain // 60 > budget
    monkeypatch.setattr("planner.verification.measured.step_peak", peaks(plain))
    with pytest.raises(CompileError, match="more than the budget of"):
        plan(model, budget, args, kwargs, costs="estimate", progress=False, compile=True)


def test_a_device_that_is_not_here_cannot_be_compiled_for():
    with pytest.raises(InputError, match="compile=True needs the device here"):
        plan(nn.Linear(2, 2), "1GiB", (torch.randn(1, 2),), device="H100-80GB", compile=True)


@has_compiler
def test_inductor_compiles_writes_layouts_and_frees_inputs():
    graph = fx.Graph()
    x, total = graph.placeholder("x"), graph.placeholder("total")
    half = graph.call_function(torch.ops.aten.mul.Tensor, (x, 0.5))
    graph.call_function(torch.ops.aten.add_.Tensor, (total, half))
    graph.output((graph.call_function(torch.ops.aten.t.default, (half,)), half))
    given, total = torch.randn(3, 4), torch.zeros(3, 4)
    run = compile_boxed(graph, [given, total])
    box_of = [given, total]
    turned, halved = run(box_of)
    assert box_of == [], "inductor no longer empties the list it is given: planned peaks would not hold"
    assert torch.equal(total, given / 2) and torch.equal(halved, given / 2) and torch.equal(turned, halved.t())
    assert turned.stride() == (1, 4) and halved.stride() == (4, 1)


@has_compiler
@pytest.mark.parametrize("name", ["mlp", pytest.param("convolution", marks=pytest.mark.zoo)])
def test_a_compiled_step_is_close_and_within_its_budget(tmp_path, name):
    model, args, kwargs = models.build(name)
    if name == "convolution":  # so that activations outweigh the workspace of convolutions; costs a second try
        args = (torch.randn(8, 3, 24, 24),)
    planned = plan(model, 0.9, args, kwargs, progress=False, compile=True, num_stages=1)
    report = verify(planned, args, kwargs, rounds=1)
    assert report.within_budget
    assert "rng" not in report.differences and report.largest_difference < 1e-5
    assert report.compiled and ("bit-equal" if report.exact else "compiled, different by up to") in unwrapped(report)
    planned.plan.save(tmp_path / "plan.json")
    applied = apply(Plan.load(tmp_path / "plan.json"), model, args, kwargs, compile=True, num_stages=1)
    assert verify(applied, args, kwargs, rounds=1).largest_difference < 1e-5


@has_compiler
def test_gradients_of_any_layout_come_in():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), torch.randn(3, 4)
    planned = plan(copy.deepcopy(model), 1.0, (x,), costs="estimate", progress=False, compile=True, num_stages=1)
    for backward in (lambda out: out.sum().backward(), lambda out: (out.t().contiguous() * torch.arange(3.0)).sum().backward()):
        for module in (model, planned):
            backward(module(x))  # an expanded gradient, without strides; a transposed one
        torch.testing.assert_close(model[0].weight.grad, planned.get_parameter("0.weight").grad)


def test_what_a_compiled_step_writes_into_must_be_laid_out_as_planned(uncompiled):
    graph = fx.Graph()
    total, x = graph.placeholder("total"), graph.placeholder("x")
    total.meta["val"] = x.meta["val"] = torch.zeros(2, 3)
    added = graph.call_function(torch.ops.aten.add_.Tensor, (total, x))
    added.meta["val"] = torch.zeros(2, 3)
    graph.output((added,))
    run = compiled.CompiledGraph(graph)
    total, x = torch.zeros(2, 3), torch.ones(3, 2).t()
    assert torch.equal(run([total, x])[0], torch.ones(2, 3)) and torch.equal(total, torch.ones(2, 3))
    with pytest.raises(CompileError, match=r"total has strides \(1, 2\), and the step was compiled for \(3, 1\). Plan again"):
        run([torch.zeros(3, 2).t(), x])


@pytest.mark.parametrize("installed", [False, True])
def test_torch_compile_around_a_plan_lets_it_run_as_planned(installed):
    model, args, kwargs = models.build("mlp")
    expected = trajectory(copy.deepcopy(model), args, kwargs)
    planned = plan(model, 0.9, args, kwargs, costs="estimate", progress=False, strict=True)
    if installed:
        install(model, planned, strict=True)
    torch._dynamo.reset()
    assert_same(expected, trajectory(torch.compile(model if installed else planned, backend="aot_eager"), args, kwargs))
