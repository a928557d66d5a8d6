"""What only a CUDA device can show: its kernels, its generator, its allocator. Skipped where there is none."""

from __future__ import annotations

import copy
import os
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits with this, if set before it starts

import torch
from torch import nn

from examples import gpt2, llama, resnet50, unet
from planner import InfeasibleBudgetError, MismatchWarning, apply, max_batch, plan, profile, sweep, verify
from planner._compat.dispatch import OpOverload
from planner.export.source import export_source
from planner.graph.floor import floor
from planner.tracer.capture import capture
from planner.tracer.target_device import TargetDevice
from tests.support import exported, models
from tests.support.training import assert_same, trajectory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BF16 = torch.bfloat16

BUILDERS = {
    "gpt2": (lambda: gpt2.build(layers=4, width=256, heads=4, length=512, batch=4, vocabulary=512), None),
    "gpt2-bf16": (lambda: gpt2.build(layers=4, width=256, heads=4, length=512, batch=4, vocabulary=512), BF16),
    "llama-bf16": (lambda: llama.build(layers=4, width=256, heads=8, length=512, batch=4, vocabulary=512), BF16),
    "resnet": (lambda: resnet50.build(layers=(1, 1, 2, 1), batch=8), None),
    "unet": (lambda: unet.build(width=16, batch=4), None),
} | {name: (lambda name=name: models.build(name), None) for name in models.MODELS}


@pytest.fixture(autouse=True)
def deterministic(request):
    """Strictly, which attention asks for; kernels of images that have no such variant repeat their bits in practice."""
    lenient = any(name in request.node.name for name in ("resnet", "unet", "skips"))
    torch.use_deterministic_algorithms(True, warn_only=lenient)
    yield
    torch.use_deterministic_algorithms(False)


def on_cuda(build):
    model, args, kwargs = build()
    moved = {id(arg): arg.cuda() for arg in (*args, *kwargs.values())}  # a tensor given twice stays one
    return model.cuda(), tuple(moved[id(arg)] for arg in args), {key: moved[id(arg)] for key, arg in kwargs.items()}


def tight(model, args, kwargs, costs="estimate", share=0.7):
    """A budget between the floor and the plain step's peak."""
    step = profile(model, args, kwargs, costs=costs)
    lowest = floor(step.graph)[0]
    return lowest + int(share * (step.plain_bytes - lowest))


def cast(dtype):
    return nullcontext() if dtype is None else torch.autocast("cuda", dtype)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(
    "name, costs", [*((name, "measure") for name in BUILDERS), ("gpt2", "estimate"), ("llama-bf16", "estimate")]
)
def test_plans_train_bit_exactly_within_their_predicted_peak(name, costs):
    build, dtype = BUILDERS[name]
    model, args, kwargs = on_cuda(build)
    with cast(dtype):
        planned = plan(model, tight(model, args, kwargs, costs), args, kwargs, costs=costs)
    report = verify(planned, args, kwargs, rounds=1)
    assert report.exact, report.differences
    assert report.measured_peak_bytes <= planned.plan.budget_bytes


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_batch_norm_runs_again_without_updating_its_statistics_again():
    model, args, kwargs = on_cuda(BUILDERS["resnet"][0])
    planned = plan(model, tight(model, args, kwargs, "measure", 0.3), args, kwargs)
    schedule = planned.plan.solution.schedule
    again = {planned.plan.graph.ops[schedule.steps[t]].name for t in schedule.recomputes()}
    assert any(name.startswith("cudnn_batch_norm") for name in again)
    assert verify(planned, args, kwargs, rounds=1).exact


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_three_steps_of_adamw_and_the_generator_after_them():
    model, args, kwargs = on_cuda(BUILDERS["gpt2"][0])
    planned = plan(copy.deepcopy(model), tight(model, args, kwargs), args, kwargs, costs="estimate")
    assert planned.plan.solution.schedule.recomputes()
    assert_same(trajectory(model, args, kwargs, accumulate=2), trajectory(planned, args, kwargs, accumulate=2))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-bf16", "llama-bf16", "resnet", "unet"])
@pytest.mark.parametrize("deterministic_kernels", [False, True])
def test_kernels_chosen_without_the_device_are_those_it_runs(name, deterministic_kernels):
    torch.use_deterministic_algorithms(deterministic_kernels, warn_only=True)
    build, dtype = BUILDERS[name]
    model, args, kwargs = on_cuda(build)
    here = capture(model if dtype is None else model.to(dtype), args, kwargs)
    far_model, far_args, far_kwargs = build()
    there = TargetDevice("this one", torch.cuda.get_device_capability())
    far = capture(far_model if dtype is None else far_model.to(dtype), far_args, far_kwargs, target=there)
    names = [[str(node.target) for node in joint.graph.nodes if isinstance(node.target, OpOverload)] for joint in (here, far)]
    only_here, only_there = sorted(set(names[0]) - set(names[1])), sorted(set(names[1]) - set(names[0]))
    assert (only_here, only_there) == ([], [])
    assert names[0] == names[1]


def test_a_plan_made_for_the_device_without_it_is_applied_on_it():
    build, _ = BUILDERS["llama-bf16"]
    model, args, kwargs = build()
    model = model.to(BF16)
    far = pickle.loads(pickle.dumps(plan(model, 0.75, args, kwargs, device="H100-80GB").plan))
    far_from_full = replace(far, budget_bytes=far.budget_bytes + 2**23)  # cuBLAS's workspace, and blocks not cut to size
    model, args, kwargs = on_cuda(lambda: (model, args, kwargs))
    planned = apply(far_from_full, model, args, kwargs)
    report = verify(planned, args, kwargs, rounds=1)
    assert report.exact
    assert report.measured_peak_bytes <= planned.plan.budget_bytes


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_keep_the_budget():
    model, args, kwargs = on_cuda(BUILDERS["gpt2"][0])
    planned = plan(model, 0.75, args, kwargs, compile=True)
    report = verify(planned, args, kwargs, rounds=1)
    assert report.measured_peak_bytes <= planned.plan.budget_bytes


def test_a_budget_below_the_floor_and_a_call_on_another_device():
    model, args, kwargs = on_cuda(lambda: models.build("mlp"))
    with pytest.raises(InfeasibleBudgetError):
        plan(model, 1024, args, kwargs)
    planned = plan(model, 1.0, args, kwargs)
    moved = copy.deepcopy(planned).cpu()
    with pytest.warns(MismatchWarning, match="on cpu.*, planned for"):
        moved(*(arg.cpu() for arg in args), **{key: arg.cpu() for key, arg in kwargs.items()})


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_exported_files_train_alike(tmp_path):
    model, args, kwargs = on_cuda(lambda: models.build("attention"))
    planned = plan(copy.deepcopy(model), tight(model, args, kwargs), args, kwargs, costs="estimate")
    export_source(planned, tmp_path / "exported_step.py")
    again = exported.load(tmp_path / "exported_step.py").model_class().cuda()
    again.load_state_dict(model.state_dict())
    assert_same(trajectory(model, args, kwargs), trajectory(again, args, kwargs))


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_opaque_parts():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    x = torch.randn(4096, 64, device="cuda")
    planned = plan(model, 1.0, (x,), opaque=("2",))
    assert verify(planned, (x,), rounds=1).exact


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_a_sweep_and_the_largest_batch():
    model, args, kwargs = on_cuda(BUILDERS["gpt2-bf16"][0])
    with torch.autocast("cuda", BF16):
        swept = sweep(model, None, args, kwargs, points=5)
        checked = swept.verify(2, rounds=1)

        def inputs(batch):
            _, args, kwargs = gpt2.build(layers=1, width=256, heads=4, length=512, batch=batch, vocabulary=512)
            return args, {key: arg.cuda() for key, arg in kwargs.items()}

        found = max_batch(inputs, model, "1GiB", effort=1.0)
    assert all(point.exact for point in checked.measured)
    assert found.batch >= 4
