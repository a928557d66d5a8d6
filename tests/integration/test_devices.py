"""Plans for devices that are not here: nothing allocated, CUDA's kernels, published rates, optimizer state."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planner
from examples import llama_7b
from planner import BudgetError, CaptureError, DeviceModel, InputError, MismatchWarning, Plan, apply, plan, sweep, verify
from planner.graph.graph import Kind
from planner.graph.structure import fingerprint
from planner.profiler.devices import devices, find_device
from planner.profiler.optimizer import master_bytes, state_bytes
from planner.tracer.capture import capture
from planner.tracer.lower import lower
from planner.tracer.target_device import TargetDevice, attention_kernel
from tests.support.text import unwrapped

SMALL = {"layers": 2, "width": 64, "intermediate": 128, "heads": 4, "length": 32, "batch": 2, "vocabulary": 64}
H100, V100 = (9, 0), (7, 0)


def meta_call(**sizes):
    model, args, kwargs = llama_7b.build(**{**SMALL, **sizes})
    return model, args, kwargs


def real_like(model):
    """The same model with storage, on the CPU."""
    twin = copy.deepcopy(model).to_empty(device="cpu")
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.fill_(0.01)
    return twin


def kernels(model, args=(), kwargs=None, capability=H100):
    joint = capture(model, args, kwargs, target=TargetDevice("there", capability))
    return [str(node.target).removeprefix("aten.").partition(".")[0] for node in joint.graph.nodes], joint


def test_a_model_without_storage_plans_as_one_with():
    model, args, kwargs = meta_call()
    real = real_like(model)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    there = TargetDevice("H100-80GB", H100)
    graphs = [
        lower(capture(m, a, k, target=there))
        for m, a, k in ((model, args, kwargs), (real, (), {"input_ids": tokens, "labels": tokens}))
    ]
    assert fingerprint(graphs[0]) == fingerprint(graphs[1])
    assert [v.nbytes for v in graphs[0].values if v.kind is Kind.INPUT] == [2 * 32 * 8], "tokens are labels too: one tensor"
    assert all(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))


def test_the_plan_says_that_it_is_estimated_and_what_is_set_aside():
    model, args, kwargs = meta_call(batch=8)
    plain = plan(model, 1.0, args, kwargs, device="h100", optimizer="adamw", progress=False).plan
    resident = sum(plain.graph.value[name].nbytes for name in plain.graph.inputs)
    budget = (2 * resident + 3 * plain.peak_bytes) // 5
    made = plan(model, budget, args, kwargs, device="h100", optimizer="adamw", progress=False).plan
    assert made.solution.schedule.recomputes()
    text = unwrapped(made)
    for part in ("estimated, not measured", "H100-80GB (not here)", "optimizer state", "libraries"):
        assert part in text
    reserved = {v.name: v.nbytes for v in made.graph.values if v.kind is Kind.RESERVED}
    assert reserved["(libraries)"] == 2 * 32 * 2**20
    assert made.peak_bytes <= made.budget_bytes


def test_allocations_are_rounded_as_cudas_allocator_does():
    model, args, kwargs = meta_call(width=12, heads=2)
    graph = lower(capture(model, args, kwargs, target=TargetDevice("there", H100)))
    assert all(value.nbytes % 512 == 0 for value in graph.values)


def test_twice_the_rate_is_half_the_time():
    model, args, kwargs = meta_call()
    slow = DeviceModel("slow", 1e12, 1e11, 0, capability=(8, 0))
    fast = DeviceModel("fast", 2e12, 2e11, 0, capability=(8, 0))
    times = [plan(model, 1.0, args, kwargs, device=device, progress=False).plan.plain.time_ns for device in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1], rel=1e-3)


class Attends(nn.Module):
    def __init__(self, mask=None, dropout=0.0, causal=True, dtype=torch.bfloat16):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype, device="meta"))
        self.mask, self.dropout, self.causal = mask, dropout, causal

    def forward(self, x):
        q, k, v = (x * self.weight).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, self.mask, self.dropout, self.causal).sum()


@pytest.mark.parametrize(
    ("capability", "width", "options", "kernel"),
    [
        (H100, 64, {}, "cudnn"),
        (H100, 256, {}, "flash"),
        ((8, 0), 64, {}, "flash"),
        ((8, 0), 20, {}, "flash"),
        ((8, 9), 200, {}, "efficient"),
        ((8, 0), 512, {}, "efficient"),
        ((8, 0), 64, {"dtype": torch.float32}, "efficient"),
        ((8, 0), 64, {"mask": torch.ones(16, 16, dtype=torch.bool), "causal": False}, "efficient"),
        ((8, 0), 20, {"mask": torch.ones(16, 16, dtype=torch.bool), "causal": False}, "math"),
        (V100, 64, {}, "math"),
        (V100, 64, {"dtype": torch.float16}, "efficient"),
        ((8, 0), 64, {"dtype": torch.float64}, "math"),
    ],
)
def test_attention_runs_the_kernel_that_cuda_chooses(capability, width, options, kernel):
    model = Attends(**options)
    x = torch.empty(2, 4, 16, 3 * width, dtype=model.weight.dtype, device="meta")
    ran, _ = kernels(model, (x,), capability=capability)
    fused = {name for name in ran if "attention" in name}
    wanted = f"_scaled_dot_product_{kernel}_attention"
    assert fused == ({wanted, f"{wanted}_backward"} if kernel != "math" else set())
    assert any("softmax" in name for name in ran) == (kernel == "math")


def test_a_users_choice_of_attention_holds():
    q = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert attention_kernel(H100, q, q, q, None, 0.0, True) == "flash"
    assert attention_kernel(H100, q, q, q, None, 0.125, True) == "cudnn"


@pytest.mark.parametrize("version, kernel", [("2.11.0", "cudnn"), ("2.12.0", "flash")])
def test_cudnn_is_given_what_it_rounds_until_torch_2_12(monkeypatch, version, kernel):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    q = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16)
    assert attention_kernel(H100, q, q, q, None, 0.1, True) == kernel


@pytest.mark.parametrize("warn_only, kernel", [(True, "cudnn"), (False, "flash")])
def test_only_strict_determinism_turns_cudnn_away(warn_only, kernel):
    q = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert attention_kernel(H100, q, q, q, None, 0.0, True) == kernel
    finally:
        torch.use_deterministic_algorithms(False)


def test_grouped_queries_keep_their_few_keys():
    class Grouped(Attends):
        def forward(self, x):
            q = x * self.weight
            return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], enable_gqa=True).sum()

    _, joint = kernels(Grouped(), (torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device="meta"),), capability=(8, 0))
    flash = next(node for node in joint.graph.nodes if "flash_attention.default" in str(node.target))
    assert flash.args[1].meta["val"].shape[1] == 2


def test_dropout_norms_and_batch_norm_as_on_cuda():
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.LayerNorm(16)).to(torch.bfloat16)
    ran, joint = kernels(model, (torch.randn(4, 8, 16, dtype=torch.bfloat16),))
    assert {"native_dropout", "native_dropout_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward"} <= set(ran)
    assert {op.name: op.recomputable for op in lower(joint).ops}["cudnn_batch_norm"], (
        "its update of the statistics can be undone"
    )
    dropout = next(node for node in joint.graph.nodes if "native_dropout.default" in str(node.target))
    assert dropout.meta["val"][1].dtype is torch.bool and dropout.name in joint.rng_states
    norm = next(node for node in joint.graph.nodes if "native_layer_norm.default" in str(node.target))
    assert norm.meta["val"][1].dtype is torch.float32
    here = capture(model, (torch.randn(4, 8, 16, dtype=torch.bfloat16),))
    assert not any("native_dropout" in str(node.target) for node in here.graph.nodes), "choices outlived their trace"


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    before, held, rng = copy.deepcopy(model.state_dict()), list(model.parameters()), torch.get_rng_state()
    plan(model, 1.0, (torch.ones(4, 8),), device="a100-40gb", optimizer="sgd", progress=False)
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(now is then and now.grad is None for now, then in zip(model.parameters(), held, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_here_the_module_trains_unplanned_with_one_warning(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), device="L4", progress=False)
    with pytest.warns(MismatchWarning, match="planned for L4-24GB, which is not here"):
        assert torch.equal(planned(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(x).sum().backward()
    with pytest.raises(InputError, match=r"which is not here\. Save the plan, and apply it there"):
        verify(planned, (x,))
    planned.plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == planned.plan and (again.provenance.costs, again.provenance.model) == ("estimated", "L4-24GB")


def test_a_plan_for_another_cpu_applies_here(tmp_path):
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)]
    model, x = nn.Sequential(*blocks), torch.randn(64, 32)
    plan(model, 0.8, (x,), device=DeviceModel("another CPU", 1e11, 1e10, 1000), progress=False).plan.save(
        tmp_path / "plan.json"
    )
    applied = apply(Plan.load(tmp_path / "plan.json"), model, (x,))
    assert verify(applied, (x,)).exact


def test_sweeps_have_devices_too_and_do_not_pretend_to_measure():
    model, args, kwargs = meta_call()
    swept = sweep(model, None, args, kwargs, points=2, low=0.999, device="H100", effort=1.0, progress=False)
    assert "estimated for H100-80GB" in unwrapped(swept)
    with pytest.raises(InputError, match="no model to run"):
        swept.verify(1)


def test_every_device_of_the_table_is_plausible_and_sourced():
    for device in devices():
        assert device.source.startswith("https://") and device.memory_bytes == int(device.name.split("-")[1][:-2]) * 2**30
        assert device.tf32_speed >= 1 and 1e12 < device.flops_per_s < 1e14 and 1e11 < device.bytes_per_s < 1e13


@pytest.mark.parametrize(("name", "message"), [("H900", "is not a known device: A10-24GB, A100-40GB"), ("a100", "A100-80GB")])
def test_an_unknown_device_lists_the_known(name, message):
    with pytest.raises(InputError, match=message):
        plan(nn.Linear(2, 1), 1.0, (torch.ones(1, 2),), device=name)


def test_devices_of_ones_own(monkeypatch):
    monkeypatch.setattr("planner.profiler.devices._devices", {})
    mine = DeviceModel("mine", 1e12, 1e11, 0)
    planner.register_device(mine)
    assert find_device("MINE") is mine and planner.devices() == (mine,)


def test_what_cannot_be_known_from_afar_is_refused():
    model, args, kwargs = meta_call()
    with pytest.raises(InputError, match="plan for a device that is not here"):
        plan(model, "1GiB", args, kwargs)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
        plan(model, "1GiB", args, kwargs, device="H100")
    with pytest.raises(BudgetError, match=r"90.00 GiB is more than the 80.00 GiB that H100-80GB has"):
        plan(model, "90GiB", args, kwargs, device="H100")
    with pytest.raises(CaptureError, match=r"plan on H100-80GB: opaque modules \(.*\) must be measured there"):
        plan(model, "1GiB", args, kwargs, device="H100", opaque=["model.norm"])

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="without storage does not have"):
        plan(Reads(2, 2, device="meta"), 1.0, (torch.ones(1, 2),), device="H100")
    planned = plan(Reads(2, 2), 1.0, (torch.ones(1, 2),), device="H100", progress=False)
    assert planned.step.joint.host_reads[0].value is True


class Mixed(nn.Module):
    """Two dtypes, a tied and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(5, 7), nn.Linear(7, 5, dtype=torch.bfloat16)
        self.tied = self.wide
        self.frozen = nn.Linear(9, 9).requires_grad_(False)


@pytest.mark.parametrize(
    "optimizer",
    [
        *("adamw", "Adam", "sgd", "RMSprop", "nadam", "adagrad"),
        functools.partial(torch.optim.SGD, momentum=0.9),
        functools.partial(torch.optim.AdamW, amsgrad=True),
    ],
)
@pytest.mark.parametrize("master", [False, True])
def test_optimizer_state_is_what_a_real_step_leaves(optimizer, master):
    model = Mixed()
    trained = [p for p in model.parameters() if p.requires_grad]
    if master:
        trained = [nn.Parameter(p.detach().float()) for p in trained]
    names = {name.lower(): kind for name, kind in vars(torch.optim).items()}
    made = optimizer(trained) if callable(optimizer) else names[optimizer.lower()](trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = sum(tensor.nbytes for state in made.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    assert state_bytes(model, optimizer, master_weights=master) == held
    assert master_bytes(model) == 4 * (7 * 5 + 5)


@pytest.mark.parametrize("optimizer", ["adamantium", "lbfgs", "adafactor"])
def test_an_optimizer_that_cannot_be_counted_is_refused(optimizer):
    with pytest.raises(InputError, match=optimizer):
        state_bytes(Mixed(), optimizer)


def test_the_budget_holds_optimizer_and_float32_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    made = plan(
        model, 1.0, (torch.randn(2, 64, dtype=torch.bfloat16),), costs="estimate", optimizer="adam", master_weights=True
    ).plan
    reserved = {v.name: v.nbytes for v in made.graph.values if v.kind is Kind.RESERVED}
    weights = sum(p.numel() for p in model.parameters())
    assert reserved == {"(optimizer state)": 8 * weights + 4 * 4, "(float32 weights)": 4 * weights}


SEVEN_BILLION = """
import resource, time
begun = time.monotonic()
from examples.llama_7b import build
from planner import plan
model, args, kwargs = build()
made = plan(model, "79GiB", args, kwargs, device="H100-80GB", optimizer="adamw").plan
assert made.peak_bytes <= 79 * 2**30 < made.plain.peak_bytes, made
assert made.solution.status == "optimal" and made.overhead < 0.15, made
print(time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.zoo
def test_seven_billion_parameters_plan_in_two_minutes_and_eight_gib():
    done = subprocess.run([sys.executable, "-c", SEVEN_BILLION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, resident_bytes = map(float, done.stdout.split())
    assert seconds < 120 and resident_bytes < 8 * 2**30
