"""Bad input: a clear error that says what and what to do, and a model left exactly as it was."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from planner import (
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    InputError,
    MismatchWarning,
    Plan,
    PlanFileError,
    apply,
    plan,
    verify,
)
from tests.support import models
from tests.support.untouched import assert_untouched, refused, snapshot


@pytest.mark.parametrize(
    "budget", ["six", "6 apples", "-3GiB", "0", 0, -5, 0.0, 1.5, -0.5, float("nan"), float("inf"), True, None]
)
def test_unreadable_or_non_positive_budget(budget):
    model, args, kwargs = models.build("mlp")
    refused(BudgetError, r"budget|size|read", model, budget, args, kwargs)


@pytest.mark.parametrize("budget", [1, "2 KiB", 0.01])
def test_budget_below_the_floor_names_the_floor_and_what_holds_it(budget):
    model, args, kwargs = models.build("convolution")
    error = refused(InfeasibleBudgetError, r"Raise the budget to .* least any schedule .* holds ", model, budget, args, kwargs)
    assert error.floor_bytes > error.budget_bytes
    assert "models.py:" in str(error) or "op " in str(error)


def test_no_example_inputs():
    refused(InputError, "no example inputs", nn.Linear(2, 2), "1GiB")


def test_no_parameter_requires_grad():
    refused(InputError, "no parameter requires grad", nn.Linear(2, 2).requires_grad_(False), "1GiB", (torch.ones(1, 2),))


def test_output_not_differentiable():
    class Argmax(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax()

    refused(InputError, "no output of the model requires grad", Argmax(2, 2), "1GiB", (torch.ones(1, 2),))


def test_loss_that_is_not_there():
    model, args, kwargs = models.build("mlp")
    refused(InputError, "no 'objective'", model, "1GiB", args, kwargs, loss="objective")
    refused(InputError, "does not name a tensor", model, "1GiB", args, kwargs, loss=lambda out: out["loss"] * 2)


def test_model_on_the_meta_device():
    with pytest.raises(InputError, match=r"to_empty.*meta device"):
        plan(nn.Linear(2, 2, device="meta"), "1GiB", (torch.ones(1, 2),), costs="estimate")


def test_model_in_eval_mode():
    refused(InputError, r"call model.train\(\) .* eval mode", nn.Linear(2, 2).eval(), "1GiB", (torch.ones(1, 2),))


def test_inputs_on_another_device():
    refused(InputError, "input 0 is on meta, the model on cpu", nn.Linear(2, 2), "1GiB", (torch.ones(1, 2, device="meta"),))


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        return h[h > 0].sum()


class BranchesOnActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        h = self.drop(self.linear(x)).sum()
        return h if h > 0 else -h


def test_data_dependent_shapes_name_the_op_and_the_line():
    refused(CaptureError, r"(nonzero|index|bool).* at .*test_bad_input\.py:\d+", Dynamic(), "1GiB", (torch.randn(3, 4),))


def test_a_model_that_is_itself_a_recurrent_kernel_is_refused():
    refused(CaptureError, "the model is a LSTM", nn.LSTM(4, 4), "1GiB", (torch.randn(2, 3, 4),))


def test_control_flow_on_random_numbers_is_refused():
    refused(
        CaptureError,
        r"control flow at .* depends on random numbers, by way of an activation \(aten\..* at drop ",
        BranchesOnActivations(),
        "1GiB",
        (torch.randn(3, 4),),
    )


def test_models_own_error_is_shown_with_its_line():
    refused(CaptureError, r"model\(\*args, \*\*kwargs\) .*RuntimeError", nn.Linear(4, 4), "1GiB", (torch.randn(3, 5),))


class Box:
    def __init__(self, loss):
        self.loss = loss


class ReturnsBox(nn.Linear):
    def forward(self, x):
        return Box(super().forward(x).sum())


def test_unknown_output_type_says_how_to_register_it():
    refused(CaptureError, r"test_bad_input\.Box.*register_pytree_node", ReturnsBox(2, 2), "1GiB", (torch.ones(1, 2),))


def test_verify_takes_only_planned_modules_and_their_call():
    model, args, kwargs = models.build("mlp")
    with pytest.raises(InputError, match="plan"):
        verify(model, args, kwargs)
    module = plan(model, 1.0, args, kwargs, costs="estimate", progress=False)
    with pytest.raises(InputError, match="input 0"):
        verify(module, (torch.randn(2, 8),), {"labels": torch.randn(2, 4)})


@pytest.fixture
def saved(tmp_path):
    model, args, kwargs = models.build("convolution")
    module = plan(model, 0.85, args, kwargs, costs="estimate", progress=False)
    module.plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json", module, model, args, kwargs


def test_plan_of_another_model_is_refused_with_the_first_difference(saved):
    path = saved[0]
    other, args, kwargs = models.build("skips")
    before = snapshot(other)
    with pytest.raises(PlanFileError, match=r"another model or call: .*\. Make it again"):
        apply(Plan.load(path), other, args, kwargs)
    assert_untouched(before, other)


def test_plan_of_the_same_model_for_another_batch_is_refused(saved):
    path, _, model, _, _ = saved
    with pytest.raises(PlanFileError, match=r"input 0 is float32\[2, 3, 8, 8\] in the plan and float32\[3, 3, 8, 8\] in"):
        apply(Plan.load(path), model, (torch.randn(3, 3, 8, 8),))


@pytest.mark.parametrize(
    "damage", [lambda t: t[:50], lambda t: "", lambda t: t.replace('"schema": 2', '"schema": 99'), lambda t: "[1]"]
)
def test_damaged_plan_file(saved, damage):
    path = saved[0]
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanFileError, match=r"plan\.json"):
        Plan.load(path)


def test_missing_plan_file(tmp_path):
    with pytest.raises(PlanFileError, match="cannot read"):
        Plan.load(tmp_path / "none.json")


def test_apply_trains_as_the_plan_did_without_solving(saved, monkeypatch):
    path, module, model, args, kwargs = saved
    monkeypatch.setattr("planner.profiled.Solver", lambda *_, **__: pytest.fail("apply must not solve"))
    again = apply(Plan.load(path), copy.deepcopy(model), args, kwargs)
    assert again.plan == module.plan and again.code == module.code
    assert verify(again, args, kwargs, rounds=1).exact


def test_apply_takes_a_plan_whose_kernels_were_measured_to_hold_more_than_they_say(tmp_path):
    model, args, kwargs = models.build("mlp")  # mse_loss keeps the unreduced losses
    made = plan(model, 1.0, args, kwargs, progress=False).plan
    assert any(value.hidden_bytes for value in made.graph.values)
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    assert verify(apply(loaded, model, args, kwargs), args, kwargs, rounds=1).exact


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(3)

    def forward(self, x, more=None):
        return self.head(x)


def test_a_lazy_module_has_to_run_once_before_it_is_planned():
    model, x = Lazy(), torch.randn(4, 5)
    with pytest.raises(InputError, match=r"run one forward first, .* head.weight of a LazyLinear is uninitialized"):
        plan(model, 1.0, (x,), costs="estimate", progress=False)
    model(x)
    plan(model, 1.0, (x,), costs="estimate", progress=False, check=False)(x).sum().backward()
    assert model.head.weight.grad.shape == (3, 5)


class Unreadable(NamedTuple):
    x: int = 1

    def __iter__(self):
        raise RuntimeError("no iteration")


class Closed:
    def __getattribute__(self, name):
        raise RuntimeError("no attributes")


class Row(tuple):
    def __iter__(self):
        raise RuntimeError("no iteration")


class Options(dict):
    def __iter__(self):
        raise RuntimeError("no iteration")


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.randn(4, 5), Unreadable()), {}, "in plain tuples, lists and dicts: .*: no iteration"),
        ((torch.randn(4, 5), [Closed()]), {}, "in plain tuples, lists and dicts: .*: no attributes"),
        (Row((torch.randn(4, 5),)), {}, "args is a Row whose iteration fails"),
        (
            (),
            Options(x=torch.randn(4, 5)),
            "kwargs is an Options whose iteration fails",
        ),
        (({torch.randn(4, 5)},), {}, "no example inputs. .* those in sets and other objects are not seen"),
    ],
)
def test_arguments_that_cannot_be_searched_for_tensors_are_refused(args, kwargs, match):
    model = Lazy()
    model(torch.randn(4, 5))
    refused(InputError, match, model, 1.0, args, kwargs)


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("no comparison")

    __hash__ = None


def test_an_argument_that_cannot_be_compared_runs_the_original_forward():
    model, x = Lazy(), torch.randn(4, 5)
    model(x)
    planned = plan(model, 1.0, (x, 1), costs="estimate", progress=False, check=False)
    with pytest.warns(MismatchWarning, match="argument leaf 1"):
        assert torch.equal(planned(x, Incomparable()), model(x))
