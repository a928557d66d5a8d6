"""estimate: measured peaks, what is live at the peak, absent devices, plans for the memory, what else would help."""

import json

import pytest
import torch
from torch import nn

from benchmarks.estimate_error import gpu_record
from examples import llama_7b
from planner import BudgetError, InputError, estimate
from planner.analysis.estimate import graph_step
from planner.profiler.memory import logical_peak
from planner.report.estimate_table import verdict
from tests.support.paths import ROOT
from tests.support.text import unwrapped

SMALL = {"layers": 2, "width": 64, "intermediate": 128, "heads": 4, "length": 32, "batch": 2, "vocabulary": 64}
QUICK = {"remedies": False, "effort": 0.1, "progress": False}


def blocks():
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(4)]
    return nn.Sequential(*inner, nn.Linear(64, 1)), torch.randn(512, 64)


def convolutions():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)), torch.randn(8, 3, 32, 32)


def measured_bytes(model, x):
    def step():
        out = model(x)
        out.backward(torch.ones_like(out))

    step()
    model.zero_grad(set_to_none=True)
    above = logical_peak(step, torch.device("cpu"))
    model.zero_grad(set_to_none=True)
    return above + sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))


@pytest.mark.parametrize("build", [blocks, convolutions])
def test_with_known_workspaces_it_is_within_one_percent_and_never_below_after_the_margin(build):
    model, x = build()
    found, real = estimate(model, (x,), costs="measure", **QUICK), measured_bytes(model, x)
    assert abs(found.peak_bytes - real) <= 0.01 * real + 4096
    assert found.needed_bytes >= real


class KeepsLocals(nn.Linear):
    """A local variable holds a tensor that the backward does not need; and in-place kernels write."""

    def forward(self, x):
        first = x + super().forward(x)
        second = first + 1
        out = (second * 2).add_(1).mul_(2)
        return (out + first.detach()).tanh().sum()


def test_tensors_that_python_holds_count_and_what_is_written_in_place_does_not():
    model, x = KeepsLocals(64, 64), torch.randn(512, 64)
    found, real = estimate(model, (x,), costs="estimate", **QUICK), measured_bytes(model, x)
    assert 0 <= real - found.peak_bytes < 64 and found.parts.total_bytes == found.peak_bytes, "scalars are not followed"
    assert abs(graph_step(found.graph).peak_bytes - real) > 64 * 512, "the joint graph cannot tell"


def test_an_opaque_module_is_followed_as_the_others_are():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(512, 64)
    model[1].register_forward_hook(lambda module, args, out: None)
    found, real = estimate(model, (x,), costs="estimate", **QUICK), measured_bytes(model, x)
    assert found.provenance.opaque == ("1",) and found.peak_bytes == real


def test_the_parts_are_what_they_say_and_add_up():
    model, x = blocks()
    found = estimate(model, (x,), costs="estimate", optimizer="adamw", reserve="1MiB", **QUICK)
    weights = sum(p.nbytes for p in model.parameters())
    parts, results = found.parts, model(x).nbytes
    assert parts.total_bytes == found.peak_bytes
    assert (parts.parameters_bytes, parts.reserved_bytes) == (weights, 2**20)
    assert parts.inputs_bytes == x.nbytes + 2 * results == graph_step(found.graph).parts.inputs_bytes
    assert parts.optimizer_bytes == 2 * weights + 4 * len(list(model.parameters()))
    assert parts.activations_bytes > 11 * x.nbytes and 0 < parts.temporaries_bytes < 6 * x.nbytes


class DropsInTheForward(nn.Sequential):
    def forward(self, x):
        return super().forward((x @ x.T) @ x * 2 + 1).tanh()


def test_the_own_step_and_the_graph_are_sorted_alike():
    model, x = DropsInTheForward(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(512, 64)
    found = estimate(model, (x,), costs="estimate", **QUICK)
    assert found.parts == graph_step(found.graph).parts and found.parts.temporaries_bytes > x.nbytes


def test_it_fits_planned_where_the_plain_step_does_not():
    model, x = blocks()
    plain = estimate(model, (x,), costs="estimate", memory="1GiB", **QUICK)
    assert plain.fits and plain.fits_planned and plain.plan is None and plain.missing_bytes == 0
    memory = (plain.lowest_bytes + plain.needed_bytes) // 2
    found = estimate(model, (x,), costs="estimate", memory=memory, **QUICK)
    assert not found.fits and found.fits_planned and found.missing_bytes == plain.needed_bytes - memory
    assert found.plan.peak_bytes + found.plan.margin_bytes <= memory and found.plan.margin_bytes > 0
    assert f"plan(model, {memory}, args)" in verdict(found) and f"{found.plan.overhead:+.1%} time" in verdict(found)


def test_what_is_set_aside_is_named_and_so_is_what_plan_must_be_given():
    model, x = blocks()
    given = {**QUICK, "optimizer": "adamw", "reserve": "1MiB"}
    assert "\nreserved, libraries" in str(estimate(model, (x,), memory="1GiB", device="H100-80GB", **given))
    plain = estimate(model, (x,), costs="estimate", memory="1GiB", **given)
    memory = (plain.lowest_bytes + plain.needed_bytes) // 2
    found = estimate(model, (x,), costs="estimate", memory=memory, **given)
    assert f"plan(model, {memory}, args, reserve=..., optimizer=...)" in verdict(found)


def test_a_memory_that_it_says_is_enough_is_enough():
    model, x = blocks()
    found = estimate(model, (x,), costs="estimate", memory="300KiB", **QUICK)
    assert found.fits_planned is False and "no plan can help" in verdict(found)
    enough = found.why_no_plan.partition("Raise the budget to ")[2].partition(",")[0].partition(" (")[2]
    again = estimate(model, (x,), costs="estimate", memory=int(enough.split()[0]), **QUICK)
    assert again.fits_planned
    assert found.floor_bytes <= found.lowest_bytes < found.peak_bytes


def test_a_device_that_is_not_here_and_a_model_without_data():
    model, args, kwargs = llama_7b.build(**SMALL)
    found = estimate(model, args, kwargs, device="H100", optimizer="adamw", progress=False)
    assert all(tensor.is_meta for tensor in model.parameters()), "nothing was allocated"
    assert found.device == "H100-80GB" and 77 * 2**30 < found.memory_bytes < 79 * 2**30 and found.fits
    assert found.parts.reserved_bytes == 2 * 32 * 2**20, "what cuBLAS holds"
    saved = {each.what: each.saved_bytes for each in found.remedies}
    weights = sum(p.numel() for p in model.parameters())
    assert saved["SGD as the optimizer"] == 2 * 2 * weights + 4 * len(list(model.parameters()))
    assert "parameters and inputs in bfloat16" not in saved, "they are"
    json.dumps(found.json())


def test_half_the_batch_saves_what_half_the_batch_needs():
    model, x = blocks()
    whole = estimate(model, (x,), costs="estimate", effort=0.1, progress=False)
    half = estimate(model, (x[:256].clone(),), costs="estimate", **QUICK)
    saved = {each.what: each.saved_bytes for each in whole.remedies}
    assert saved["half the batch"] == whole.peak_bytes - half.peak_bytes
    one = estimate(model, (x[:1].clone(),), costs="estimate", **QUICK)
    assert "half the batch" not in {each.what for each in one.remedies}
    narrow = estimate(model.to(torch.bfloat16), (x.to(torch.bfloat16),), costs="estimate", **QUICK)
    assert saved["parameters and inputs in bfloat16"] == whole.peak_bytes - narrow.peak_bytes
    assert 0 < saved["bfloat16 autocast"] < saved["parameters and inputs in bfloat16"]


def test_the_model_is_left_as_it_is():
    model, x = blocks()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    estimate(model, (x,), costs="estimate", optimizer="sgd", effort=0.1, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.dtype is torch.float32 for p in model.parameters()) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_under_autocast_on_the_device():
    model, x = blocks()
    plain = estimate(model, (x,), device="H100", **QUICK)
    cast = estimate(model, (x,), device="H100", autocast="bfloat16", **QUICK)
    kernels = {(op.kernel, op.arguments.count("bfloat16") > 0) for op in cast.graph.ops}
    assert ("aten.addmm.default", True) in kernels and ("aten.addmm.default", False) not in kernels
    assert cast.parts.activations_bytes < plain.parts.activations_bytes
    there = next(each for each in estimate(model, (x,), device="H100", progress=False).remedies if "autocast" in each.what)
    assert there.saved_bytes == plain.peak_bytes - cast.peak_bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory": "soon"}, BudgetError, "write the memory as .*'soon' cannot be read"),
        ({"autocast": "int8"}, InputError, "give 'bfloat16' or 'float16'"),
        ({"device": "H900"}, InputError, "is not a known device"),
        ({"remedies": 1}, InputError, "give True or False"),
    ],
)
def test_bad_input_is_one_clear_error(options, error, message):
    with pytest.raises(error, match=message):
        estimate(nn.Linear(2, 1), (torch.ones(1, 2),), **options)


def test_a_model_without_data_needs_a_device():
    model, args, kwargs = llama_7b.build(**SMALL)
    with pytest.raises(InputError, match="device='H100-80GB'"):
        estimate(model, args, kwargs)


def test_it_prints_within_80_columns():
    model, x = blocks()
    text = str(estimate(model, (x,), costs="estimate", memory="2MiB", optimizer="adamw", effort=0.1, progress=False))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("verdict", "does not fit", "peak at", "no plan can peak below", "activations", "half the batch"):
        assert part in unwrapped(text)


EAGER = {
    record["model"]: record["allocated_bytes"]
    for record in map(json.loads, (ROOT / "benchmarks/results/gpu-2026-11-27.jsonl").read_text().splitlines())
    if record["case"] == "eager"
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", EAGER)
def test_without_the_device_it_is_within_one_percent_of_what_an_h200_measured(name):
    found = gpu_record(name, EAGER[name])["afar"]
    assert abs(found["peak_bytes"] - EAGER[name]) <= 0.01 * EAGER[name] and found["needed_bytes"] >= EAGER[name]
