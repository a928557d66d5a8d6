"""plan(..., dynamic=True): one plan for inputs of every size up to the planned one."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

from examples import gpt2
from planner import CaptureError, MismatchError, MismatchWarning, apply, install, plan
from planner.graph.graph import Kind
from planner.profiler.memory import logical_peak
from planner.runtime.other_sizes import _ordinal, larger_than_all
from tests.support import models
from tests.support.training import assert_same, trajectory


@pytest.fixture(scope="module")
def made():
    model, args, kwargs = gpt2.build(layers=2, width=32, heads=2, length=24, vocabulary=64, batch=4)
    return plan(model, 0.75, args, kwargs, costs="estimate", progress=False, dynamic=True, effort=1), kwargs


def smaller(kwargs, batch, length):
    less = {id(tensor): tensor[:batch, :length].contiguous() for tensor in kwargs.values()}
    return {name: less[id(tensor)] for name, tensor in kwargs.items()}  # the labels are the tokens here too


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("batch", "length"), [(4, 24), (2, 24), (4, 9), (3, 5)])
def test_smaller_calls_run_planned_exactly_and_within_the_budget(made, batch, length):
    module, kwargs = made
    kwargs = smaller(kwargs, batch, length)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        expected = trajectory(copy.deepcopy(module.original), (), kwargs, accumulate=2)
        assert_same(expected, trajectory(copy.deepcopy(module), (), kwargs, accumulate=2))
        module(**kwargs).loss.backward()  # the capture of a new shape is no part of a step
        module.zero_grad()
        above = logical_peak(lambda: module(**kwargs).loss.backward(), module.device)
    module.zero_grad()
    resident = sum(module.plan.graph.value[name].nbytes for name in module.plan.graph.inputs)
    assert above + resident <= module.plan.budget_bytes


def test_a_shape_is_captured_once(made, monkeypatch):
    module, kwargs = copy.deepcopy(made[0]), smaller(made[1], 2, 7)
    module(**kwargs)
    monkeypatch.setattr("planner.runtime.other_sizes.capture", lambda *_, **__: pytest.fail("captured again"))
    module(**kwargs).loss.backward()


def measured(module, args, kwargs):
    """The peak of a step, everything resident included; the capture of a new size is no part of it."""
    module(*args, **kwargs).loss.backward()
    module.zero_grad()
    above = logical_peak(lambda: module(*args, **kwargs).loss.backward(), module.device)
    module.zero_grad()
    weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    given = {id(tensor): tensor for tensor in (*args, *kwargs.values())}
    return above + sum(tensor.nbytes for tensor in (*weights.values(), *given.values()))


def test_larger_calls_are_planned_for_the_same_budget(made):
    module, repeated = copy.deepcopy(made[0]), made[1]["input_ids"].repeat(2, 1)[:5]
    kwargs = dict.fromkeys(made[1], repeated)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        expected = trajectory(copy.deepcopy(module.original), (), kwargs)
        assert_same(expected, trajectory(copy.deepcopy(module), (), kwargs))
        assert measured(module, (), kwargs) <= module.plan.budget_bytes
    assert len(module._other_sizes.planned_anew) == 1


def test_calls_too_large_for_the_budget_run_unplanned_and_say_so(made):
    module, repeated = copy.deepcopy(made[0]), made[1]["input_ids"].repeat(8, 1)
    kwargs = dict.fromkeys(made[1], repeated)
    with pytest.warns(MismatchWarning, match=r"(?s)below .* least .* input 0 is \[32, 24\], larger than the planned \[4, 24\]"):
        module(**kwargs).loss.backward()
    module.strict = True
    with pytest.raises(MismatchError, match="the least any schedule"):
        module(**kwargs)


def test_a_larger_call_is_told_of_whatever_was_told_before():
    x = torch.randn(4, 8)
    module = plan(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 1.0, (x,), costs="estimate", progress=False)
    module[0].register_forward_hook(lambda *_: None)
    with pytest.warns(MismatchWarning, match="new hook"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    for rows in (5, 6):
        with pytest.warns(MismatchWarning, match=rf"new hook.*input 0 is \[{rows}, 8\], larger than the planned \[4, 8\]"):
            module(torch.randn(rows, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(6, 8))


def test_a_call_is_larger_if_a_dimension_is():
    x = torch.randn(4, 8)
    step = plan(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 1.0, (x,), costs="estimate", progress=False).step
    assert larger_than_all([step], (torch.randn(2, 16),), {}) == "input 0 is [2, 16], larger than the planned [4, 8]"
    for args in ((x[:2],), (x[:2, None],), ("x",), ()):
        assert larger_than_all([step], args, {}) == ""


def test_an_applied_plan_covers_sizes_up_to_its_own(made):
    module, kwargs = made
    again = apply(module.plan, module.original, (), kwargs, dynamic=True, progress=False)
    with pytest.warns(MismatchWarning, match="this dynamic plan covers up to"):
        again(**{name: kwargs["input_ids"].repeat(2, 1) for name in kwargs})


class Alternates(nn.Module):
    """A small batch goes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh().sum() if len(x) > 2 else self.layer(x).sum()


def test_a_size_at_which_the_graph_is_another_one_is_planned_anew(capsys):
    model, x = Alternates(), torch.randn(2, 8)
    module = plan(model, 1.0, (torch.randn(4, 8),), costs="estimate", dynamic=True)
    expected = trajectory(copy.deepcopy(model), (x,), {})
    assert_same(expected, trajectory(copy.deepcopy(module), (x,), {}))
    for rows in (x, x, x[:1], torch.randn(3, 8)):
        module(rows)
    said = capsys.readouterr().err.splitlines()[-4:]
    assert said[0] == "planner: Alternates: planning (2, 8) while training waits"
    assert [line.rpartition(" in ")[0] for line in said[1:]] == [
        "planner: Alternates: planned (2, 8), the second size,",
        "planner: Alternates: captured (1, 8), the third size,",
        "planner: Alternates: captured (3, 8), the fourth size,",
    ]


class Masked(nn.Module):
    """Leaves a mask out where it masks nothing, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.layer(x))
        if not mask.all():
            h = h * mask.unsqueeze(-1)
        return self.last(torch.sigmoid(h)).square().sum()


@pytest.mark.parametrize("first", [True, False], ids=["full mask first", "padded first"])
def test_padded_and_full_batches_run_planned(first):
    model, x = Masked(), torch.randn(4, 8)
    full, padded = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False])
    module = plan(model, 1.0, (x, full if first else padded), costs="estimate", progress=False, dynamic=True)
    calls = [(x, full), (x, padded), (x[:2], full[:2]), (x[1:], padded[1:]), (x[2:], padded[2:]), (x[:2], full[2:])]
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        for call in calls:
            assert_same(trajectory(copy.deepcopy(model), call, {}), trajectory(copy.deepcopy(module), call, {}))
            module(*call).backward()
    assert module.num_unplanned_calls == 0
    assert len(module._other_sizes.planned_anew) == 1, "smaller batches share the two schedules"


class ReadsASum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh().sum() * k.item()


def test_a_value_that_is_always_another_one_is_captured_a_few_times_alone():
    model, x = ReadsASum(), torch.randn(4, 8)
    module = plan(model, 1.0, (x, torch.tensor(0.0)), costs="estimate", progress=False, dynamic=True)
    for k in range(1, 5):
        module(x, torch.tensor(float(k)))
    with pytest.warns(MismatchWarning, match="another at every call"):
        out = module(x, torch.tensor(5.0))
    assert torch.equal(out, model(x, torch.tensor(5.0)))
    module(x, torch.tensor(3.0))
    assert (module.num_planned_calls, module.num_unplanned_calls) == (5, 1)


def test_sizes_are_captured_before_training(monkeypatch):
    x = torch.randn(4, 8)
    sizes = [((x[:2],), {}), ((x[:1],), {}), ((torch.randn(6, 8),), {})]
    module = plan(Alternates(), "1 MiB", (x,), costs="estimate", progress=False, sizes=sizes)
    monkeypatch.setattr("planner.runtime.other_sizes.capture", lambda *_, **__: pytest.fail("captured again"))
    for args, kwargs in sizes:
        module(*args, **kwargs).backward()
    assert module.num_unplanned_calls == 0


def test_a_size_that_cannot_be_planned_is_an_error_before_training():
    x = torch.randn(4, 8)
    with pytest.raises(CaptureError, match="a call of sizes= cannot be planned: the structure of the arguments"):
        plan(Alternates(), 1.0, (x,), costs="estimate", progress=False, sizes=[((x, x), {})])


def test_calls_are_counted():
    x = torch.randn(4, 8)
    module = plan(Alternates(), 1.0, (x,), costs="estimate", progress=False, dynamic=True)
    for call in (x, x, x, x[:2]):
        module(call)
    with torch.no_grad():
        module(x)
    module.layer.register_forward_hook(lambda *_: None)
    with pytest.warns(MismatchWarning, match="new hook"):
        module(x)
    stats = module.stats()
    assert (stats.planned, stats.unplanned, stats.evaluations, stats.audits, stats.skipped_audits) == (4, 1, 1, 1, 0)
    assert stats.sizes == (("(4, 8)", 3), ("(2, 8)", 1))
    assert stats.reasons == (("module", "a submodule's hooks", 1),)
    assert stats.planning_s > 0
    text = str(stats)
    assert "4 planned, 1 unplanned, 1 in evaluation" in text and "(2, 8)" in text and "a submodule's hooks" in text


def captures(module):
    return len(module._other_sizes.pauses)


def test_the_size_that_did_not_come_for_longest_is_forgotten(monkeypatch):
    monkeypatch.setattr("planner.runtime.other_sizes.MOST_SIZES", 2)
    x = torch.randn(8, 8)
    module = plan(nn.Sequential(nn.Linear(8, 8)), 1.0, (x,), costs="estimate", progress=False, dynamic=True)
    for batch in (2, 3, 2, 4):
        module(x[:batch])
    assert captures(module) == 3
    module(x[:2])
    assert captures(module) == 3
    module(x[:3])
    assert captures(module) == 4


def test_what_one_of_several_installed_plans_is_for_is_no_new_size_of_another():
    x = torch.randn(8, 8)
    model = nn.Sequential(nn.Linear(8, 8))
    first, second = (plan(model, 1.0, (y,), costs="estimate", progress=False, dynamic=True) for y in (x, x[:2]))
    install(model, first, second)
    model(x[:2])
    assert (captures(first), captures(second), second.num_planned_calls) == (0, 0, 1)
    model(x[:3])
    assert (captures(first), captures(second), first.num_planned_calls) == (1, 0, 1)
    assert first.stats().unplanned == second.stats().unplanned == 0


def test_a_plan_made_anew_sets_the_same_bytes_aside_without_the_optimizer():
    x = torch.randn(4, 8)
    model = Alternates()
    optimizer = torch.optim.AdamW(model.parameters())
    options = {"costs": "estimate", "progress": False, "dynamic": True, "optimizer": optimizer, "reserve": 1000}
    module = plan(model, "1MiB", (x,), **options)
    assert b"AdamW" not in pickle.dumps(module)
    module(x[:2])
    (anew,) = module._other_sizes.planned_anew
    aside, aside_anew = ([v.nbytes for v in one.plan.graph.values if v.kind is Kind.RESERVED] for one in (module, anew))
    assert len(aside) == 2 and sum(aside) == sum(aside_anew) > 1000


def test_a_planned_module_has_the_signature_of_the_model():
    model, args, kwargs = models.build("attention")
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False)
    assert inspect.signature(module.forward) == inspect.signature(model.forward)
    assert inspect.signature(copy.deepcopy(module).forward) == inspect.signature(model.forward)


def test_copies_pickles_and_installed_models_hold_for_smaller_calls_too():
    model, args, kwargs = models.build("attention")
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False, dynamic=True)
    less = tuple(tensor[:, :-1] for tensor in args), {name: tensor[:, :-1] for name, tensor in kwargs.items()}
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    installed = copy.deepcopy(model)
    install(installed, plan(installed, 1.0, args, kwargs, costs="estimate", progress=False, dynamic=True))
    expected = trajectory(copy.deepcopy(model), *less)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        for twin in (*twins, installed):
            assert_same(expected, trajectory(twin, *less))


def test_a_size_that_an_audit_refused_is_not_planned_again(monkeypatch):
    x = torch.randn(4, 8)
    module = plan(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "1MiB", (x,), costs="estimate", progress=False, dynamic=True)
    module(x[:2])
    monkeypatch.setattr("planner.runtime.audit.repeatable_difference", lambda *_: ["output 0"])
    monkeypatch.setattr("planner.runtime.other_sizes.capture", lambda *_, **__: pytest.fail("captured again"))
    with pytest.warns(MismatchWarning, match="the audit"):
        module(x[:2])  # the second planned call of this size is audited
    out = module(x[:2])
    stats = module.stats()
    assert torch.equal(out, module.original(x[:2])) and (stats.planned, stats.unplanned, stats.audits) == (1, 2, 0)


def test_gradients_of_earlier_micro_steps_count_once_at_other_sizes():
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)), torch.randn(64, 8)
    options = {"costs": "estimate", "progress": False, "accumulate": True, "optimizer": "adamw"}
    expected = plan(model, "1MiB", (x,), **options).plan.plain.peak_bytes
    module = plan(model, "1MiB", (x[:8],), dynamic=True, **options)
    module(x)
    (other,) = module._other_sizes.planned_anew
    assert other.plan.plain.peak_bytes == expected


def test_a_planned_sequence_is_one():
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    module = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert len(module) == 2 and module[0] is model[0] and [*module] == [*model] and [*copy.deepcopy(module)][1:]
    module[1] = nn.Sigmoid()
    assert isinstance(model[1], nn.Sigmoid)
    with pytest.raises(TypeError, match="not subscriptable"):
        plan(nn.Linear(8, 8), 1.0, (x,), costs="estimate", progress=False)[0]


def test_ordinals():
    assert [_ordinal(n) for n in (2, 10, 11, 12, 13, 21, 22, 23, 24, 101, 111)] == [
        *("second", "tenth", "11th", "12th", "13th", "21st", "22nd", "23rd", "24th", "101st", "111th")
    ]
