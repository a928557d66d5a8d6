"""plan_units on models end to end: bits over three steps, measured peaks within the budget, in place and undone."""

import copy
import os
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planner
from planner import (
    InputError,
    MismatchWarning,
    NoScheduleFoundError,
    PlanFileError,
    UnitPlan,
    apply_units,
    plan_units,
    uninstall,
    unplan,
)
from planner.profiler.memory import logical_peak
from tests.support.paths import ROOT
from tests.support.training import assert_same, trajectory

QUICK = {"costs": "estimate", "effort": 0.3, "progress": False}


class Block(nn.Module):
    def __init__(self, width, dropout=0.1):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop, self.layer_idx = nn.Dropout(dropout), torch.randint(1000, ()).item()

    def forward(self, x):
        return x + self.drop(self.narrow(F.gelu(self.wide(self.norm(x)))))


class Net(nn.Module):
    """Equal blocks between outer code; with `picks`, a shape of the model's own forward depends on the data."""

    def __init__(self, width=32, depth=4, picks=False):
        super().__init__()
        self.embed, self.blocks, self.picks = nn.Linear(8, width), nn.ModuleList(Block(width) for _ in range(depth)), picks
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        if self.picks:
            hidden = hidden[hidden.sum(1) > hidden.sum(1).median()]
        return self.head(hidden).square().mean()


class Stages(nn.Module):
    """A convolutional net of stages, with batch norm; the first block of a stage differs from the others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(nn.Sequential(self.block(8), self.block(8)) for _ in range(2)))

    @staticmethod
    def block(width):
        layers = (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        return nn.Sequential(*layers, *copy.deepcopy(layers))

    def forward(self, x):
        return self.stages(self.stem(x)).square().mean()


def net(picks=False, rows=256):
    torch.manual_seed(0)
    return Net(picks=picks).train(), (torch.randn(rows, 8),)


def stages():
    torch.manual_seed(0)
    return Stages().train(), (torch.randn(4, 3, 16, 16),)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32, use_cache=False)
    tokens = torch.randint(64, (4, 32))
    return GPT2LMHeadModel(config).train(), (), {"input_ids": tokens, "labels": tokens}


def measured(model, args, kwargs):
    def step():
        out = model(*args, **kwargs)
        (out if isinstance(out, torch.Tensor) else out.loss).backward()

    model.zero_grad()
    step()
    model.zero_grad()
    given = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor)]
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *given)}
    return sum(storage.nbytes() for storage in tensors.values()) + logical_peak(step, torch.device("cpu"))


CASES = {
    "blocks": (net, 4),
    "blocks of a model that cannot be captured": (lambda: net(picks=True), 4),
    "stages of convolutions": (stages, 2),
    "gpt2": (gpt2, 2),
}


class Cast(nn.Module):
    """Runs a model's forward in an autocast region of its own."""

    def __init__(self, model, is_on):
        super().__init__()
        self.model, self.is_on = model, is_on

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_on):
            return self.model(*args, **kwargs)


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("blocks", "bf16"),
        ("blocks of a model that cannot be captured", "fp32"),
        ("blocks of a model that cannot be captured", "bf16"),
        ("stages of convolutions", "bf16"),
        ("gpt2", "fp32"),
    ],
)
def test_bits_and_peak(name, precision):
    build, count = CASES[name]
    model, args, *rest = build()
    kwargs, is_cast = rest[0] if rest else {}, precision == "bf16"
    expected = trajectory(Cast(copy.deepcopy(model), is_cast), args, kwargs, accumulate=2)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        found = plan_units(model, 0.85, args, kwargs, **QUICK)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert len(found.planned) == count and found.plan.recompute_ns > 0
    assert found.plan.outer.is_measured == name.endswith("cannot be captured")
    assert measured(Cast(copy.deepcopy(model), is_cast), args, kwargs) <= found.budget_bytes < found.plain_bytes
    assert found.peak_bytes <= found.budget_bytes
    report = found.verify(args, kwargs)
    assert report.exact and report.within_budget and not report.unplanned, str(report)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*which its plan does not count")
        assert_same(expected, trajectory(Cast(model, is_cast), args, kwargs, accumulate=2))
    assert all(module.num_planned_calls and not module.num_unplanned_calls for module in found.planned.values())
    unplan(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_equal_blocks_are_captured_once_and_others_on_their_own():
    model, args = net()
    model.blocks[1].drop.p = 0.3
    model.blocks[2].norm.weight.requires_grad_(False)
    found = plan_units(model, 1.0, args, **QUICK)
    assert len(found.plan.kinds) == 3 and [kind for kind, _ in found.plan.units.values()] == [0, 1, 2, 0]
    assert found.plan.recompute_ns == 0 and found.plan.gap == 0
    assert found.verify(args).exact


def test_the_table_says_how_many_units_run_how():
    model, args = net()
    found = plan_units(model, 0.75, args, **QUICK)
    text = str(found)
    assert "Block (4x)" in text and "blocks." in text and "optimality" in text and "% of the plain step" in text
    at = found.plan
    assert at.whole.peak_bytes == at.peak_bytes <= found.budget_bytes
    assert at.bound_ns <= at.recompute_ns == sum(m.plan.timeline.time_ns - m.plan.plain.time_ns for m in found.planned.values())


def test_saved_loaded_and_applied_to_a_fresh_model(tmp_path):
    model, args = net()
    found = plan_units(model, 0.8, args, **QUICK)
    found.save(tmp_path / "units.json")
    loaded = UnitPlan.load(tmp_path / "units.json")
    assert loaded == found.plan and str(loaded) == str(found)
    fresh, _ = net()
    expected = trajectory(copy.deepcopy(fresh), args, {})
    applied = apply_units(loaded, fresh, args, progress=False)
    assert len(applied.planned) == 4 and applied.peak_bytes == found.peak_bytes
    assert_same(expected, trajectory(fresh, args, {}))
    applied.uninstall()
    assert not any("forward" in vars(module) for module in fresh.modules())
    wider = Net(width=16).train()
    with pytest.raises(PlanFileError, match="made for another model or call"):
        apply_units(loaded, wider, args, progress=False)
    with pytest.raises(PlanFileError, match=r"no submodule blocks\.3"):
        apply_units(loaded, Net(depth=3).train(), args, progress=False)
    assert not any("forward" in vars(module) for module in wider.modules())


def test_accumulated_gradients_are_told_of_once():
    model, args = net()
    found = plan_units(model, 0.8, args, **QUICK)
    model(*args).backward()
    with pytest.warns(UserWarning, match="which its plan does not count") as heard:
        model(*args).backward()
    model(*args).backward()
    assert len(heard) == 1
    found.uninstall()


def test_a_call_of_another_size_names_a_cure_that_units_have():
    model, args = net()
    found = plan_units(model, 0.8, args, **QUICK)
    with pytest.warns(MismatchWarning, match="of the step that plan_units was given") as heard:
        model(*(arg[:-1] for arg in args)).backward()
    assert not any("also=" in str(one.message) for one in heard)
    found.uninstall()


def test_names_and_classes():
    model, args = net()
    named = plan_units(model, 0.9, args, units=["blocks.0", "blocks.2"], **QUICK)
    assert set(named.planned) == {"blocks.0", "blocks.2"}
    assert len(plan_units(model, 0.9, args, units=Block, **QUICK).planned) == 4  # in place of what was installed
    assert all("forward" in vars(block) for block in model.blocks)
    model.last = model.blocks[-1]
    assert set(plan_units(model, 0.9, args, units=Block, **QUICK).planned) == {f"blocks.{k}" for k in range(4)}
    assert set(plan_units(model, 1.0, args, units="last", **QUICK).planned) == {"blocks.3"}


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unlike, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight

    def forward(self, x):
        hidden = self.first(x)
        return self.tied(self.unlike(hidden) + self.unlike(hidden[:1])).square().mean()


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ("seventh", "no submodule 'seventh'; did you mean"),
        ("frist", "did you mean 'first'"),
        ("", "which planner.plan plans as a whole"),
        (nn.Conv2d, "no submodule of the model is a Conv2d; it has 4 Linear"),
        ([], "units is empty"),
        (3, "units is an int: give qualified names"),
        ([3], "units holds an int"),
        ("unlike", "unlike cannot be a unit: it is called 2 times in a step, and not alike: input 0"),
        ("idle", "idle cannot be a unit: it is called 0 times in a step"),
        ("first", "first cannot be a unit: its weight is also another module's"),
    ],
)
def test_what_cannot_be_a_unit(units, said):
    model = Odd().train()
    with pytest.raises(InputError, match=re.escape(said)):
        plan_units(model, 0.9, (torch.randn(4, 8),), units=units, **QUICK)
    assert not any("forward" in vars(module) for module in model.modules())


def test_units_in_each_other():
    model, args = net()
    with pytest.raises(InputError, match=re.escape("blocks.1.wide lies inside blocks.1")):
        plan_units(model, 0.9, args, units=["blocks.1", "blocks.1.wide"], **QUICK)


def test_a_budget_that_no_units_can_meet():
    model, args = net()
    with pytest.raises(NoScheduleFoundError, match=r"a measured step peaks at .*\(\d+ bytes\); the budget is") as error:
        plan_units(model, 0.1, args, **QUICK)
    found = plan_units(model, error.value.lowest_bytes, args, **QUICK)
    assert found.peak_bytes <= error.value.lowest_bytes


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "units.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    assert names["again"].peak_bytes <= names["units"].budget_bytes and "bit-equal" in capsys.readouterr().out


def test_plan_children_is_the_former_name():
    model, args = net(picks=True)
    with pytest.warns(DeprecationWarning, match="plan_children is now plan_units"):
        made = planner.plan_children(model, 0.9, args, **QUICK)
    assert isinstance(made, planner.PlannedUnits) and {"embed", "head"} <= set(made.planned) and made.model is model
    assert not any("forward" in vars(module) for module in model.modules())
    made.install()
    assert any("forward" in vars(module) for module in model.modules())
    uninstall(model)
    unplan(model)


class NormalizedFirst(nn.Module):
    """A layer norm whose results have other strides than their fakes: under autocast, of a transposed gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x)))).transpose(1, 2)


def test_a_kernel_with_a_named_tuple_of_results_that_are_not_laid_out_as_their_fakes():
    model, x = NormalizedFirst(), torch.randn(4, 5, 8)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        plan_units(model, 1.0, (x,), **QUICK)
        outs = [module(x) for module in (model, twin)]
    assert torch.equal(*outs)
    for module, out in zip((model, twin), outs, strict=True):
        out.float().sum().backward()
        assert module.a.weight.grad is not None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class InEnvironment(Net):
    """Counts its calls where the whole process sees it."""

    def forward(self, x):
        os.environ["NUM_CALLS"] = str(int(os.environ["NUM_CALLS"]) + 1)
        return super().forward(x)


def test_environment_variables_stay(monkeypatch):
    monkeypatch.setenv("NUM_CALLS", "0")
    model = InEnvironment(picks=True).train()
    plan_units(model, 1.0, (torch.randn(16, 8),), **QUICK)
    assert os.environ["NUM_CALLS"] == "0"


class WrittenInto(Net):
    """Writes into what its blocks return."""

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
            hidden += self.embed.bias.detach()
            hidden.mul_(2)
        return self.head(hidden).square().mean()


def test_blocks_whose_outputs_the_caller_writes_into_are_units():
    model, x = WrittenInto().train(), torch.randn(64, 8)
    expected = trajectory(copy.deepcopy(model), (x,), {})
    found = plan_units(model, 0.97, (x,), **QUICK)
    assert len(found.planned) == 4 and found.plan.recompute_ns > 0 and not found.plan.left
    assert measured(copy.deepcopy(model), (x,), {}) <= found.budget_bytes
    assert_same(expected, trajectory(model, (x,), {}))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_model_that_holds_a_computed_weight_is_copied():
    """The former weight_norm leaves a tensor with history on the module, which copy.deepcopy refuses."""
    model, x = Net().train(), torch.randn(64, 8)
    torch.nn.utils.weight_norm(model.head)
    model(x)
    found = plan_units(model, 0.97, (x,), **QUICK)
    assert found.planned and isinstance(model.head.weight_g, nn.Parameter)
    twin = Net().train()
    torch.nn.utils.weight_norm(twin.head)
    twin.load_state_dict(model.state_dict())
    assert_same(trajectory(twin, (x,), {}), trajectory(model, (x,), {}))
