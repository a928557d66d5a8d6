"""Every argument of every public function, of every wrong type: one clear InputError or BudgetError, and nothing is touched."""

import copy
import functools
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import planner
from planner import (
    BudgetError,
    DeviceModel,
    InfeasibleBudgetError,
    InputError,
    NoScheduleFoundError,
    Plan,
    PlanFileError,
    PlannerError,
    Sweep,
    apply,
    export_source,
    install,
    max_batch,
    plan,
    plan_units,
    register_device,
    sweep,
    uninstall,
    verify,
)
from planner.analysis.margin import smallest_budget
from planner.cli import main
from planner.units import enough_text, parse_bytes, shown
from tests.support.text import without_stages

X = torch.randn(8, 6)
QUICK = {"costs": "estimate", "progress": False}
LONG = 10**5000


def label(value):
    """A test's id: the same in every process."""
    return type(value).__name__


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))


@functools.cache
def planned():
    return plan(model(), 1.0, (X,), **QUICK)


@functools.cache
def swept():
    return sweep(model(), None, (X,), points=2, effort=0.5, **QUICK)


def check(error, call):
    """The error is one line, short, and says nothing of objects' insides."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert 10 < len(message) < 1000 and "object at 0x" not in message, message
    assert not re.search(r"\d{200}|exceeds the limit", message, re.IGNORECASE)
    return message


BUDGETS = {
    "an int of 5,000 digits": LONG,
    "minus that": -LONG,
    "a str of 5,000 digits": "9" * 5000,
    "a str of 5,000 digits and a unit": "9" * 5000 + "GiB",
    "a fraction of 5,000 digits": "0." + "9" * 5000 + "x",
    "a long word": "x" * 100_000,
    "bool": True,
    "numpy's bool": np.bool_(True),
    "nan": math.nan,
    "inf": math.inf,
    "numpy's nan": np.float32("nan"),
    "numpy's int, negative": np.int64(-5),
    "above one": np.float64(1.5),
    "a number of digits in a str": "NaN",
    "inf in a str": "inf",
    "None": None,
    "bytes": b"6GiB",
    "a list": ["6GiB"],
    "a tensor": torch.tensor(0.5),
    "an array": np.array([0.5]),
    "complex": 1j,
    "a dict": {},
    "a class": int,
    "0": 0,
    "": "",
    "a unit": "GiB",
    "two numbers": "6 6 GiB",
    "two points": "6.0.0GiB",
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_budgets(budget):
    net = model()
    check(BudgetError, lambda: plan(net, budget, (X,), **QUICK))
    check(BudgetError, lambda: plan_units(net, budget, (X,), **QUICK))
    check(BudgetError, lambda: max_batch(lambda n: ((X[:n],), {}), net, budget, **QUICK))
    check(BudgetError, lambda: sweep(net, [budget], (X,), **QUICK))
    if budget is not None:
        check(BudgetError, lambda: sweep(net, None, (X,), low=budget, **QUICK))
        check(PlannerError, lambda: swept().best(budget=budget))
    if budget != 0 and isinstance(budget, (str, type(None), float, list, bytes, dict)):
        check(BudgetError, lambda: plan(net, 1.0, (X,), reserve=budget, **QUICK))


@pytest.mark.parametrize("budget", [np.int64(2**20), np.uint8(255) * np.int64(9000), "1 MiB", "1048576 bytes", " 1mib "])
def test_budgets_that_are_read(budget):
    assert parse_bytes(budget) >= 2**20
    assert plan(model(), budget, (X,), **QUICK).plan.budget_bytes == parse_bytes(budget)


@pytest.mark.parametrize("budget", [np.float32(1.0), np.float64(1.0), Fraction(1), 1.0])
def test_fractions_that_are_read(budget):
    if isinstance(budget, Fraction):
        check(BudgetError, lambda: plan(model(), Fraction(3, 2), (X,), **QUICK))
    assert plan(model(), budget, (X,), **QUICK).plan.overhead == 0


def test_a_decimal_is_read_as_it_is_written():
    assert (
        parse_bytes("0.1kB") == 100 and parse_bytes("1.005GB") == 1_005_000_000 and parse_bytes("." + "3" * 4000 + "kB") == 333
    )


@torch.jit.ignore
def plain_function(x):
    return x


class Uninitialized(nn.Module):
    def __init__(self):
        pass


MODELS = {
    "None": None,
    "a class": nn.Linear,
    "a class that is no module": int,
    "a function": lambda x: x,
    "a partial": functools.partial(nn.Linear, 2),
    "a str": "model",
    "a tensor": torch.ones(2),
    "a dict": nn.Linear(2, 2).state_dict(),
    "a list": [nn.Linear(2, 2)],
    "not initialized": Uninitialized(),
}


@pytest.mark.parametrize("wrong", MODELS.values(), ids=MODELS)
def test_models(wrong):
    for call in (
        lambda: plan(wrong, 1.0, (X,), **QUICK),
        lambda: plan_units(wrong, 1.0, (X,), **QUICK),
        lambda: sweep(wrong, None, (X,), **QUICK),
        lambda: max_batch(lambda n: ((X[:n],), {}), wrong, "1GiB", **QUICK),
        lambda: apply(planned().plan, wrong, (X,)),
        lambda: install(wrong, planned()),
        lambda: uninstall(wrong),
    ):
        assert "model" in check(InputError, call)


def test_a_script_module_is_no_model():
    with pytest.warns(DeprecationWarning):  # torch.jit itself
        scripted = torch.jit.trace(model(), X)
    assert "torch.jit" in check(InputError, lambda: plan(scripted, 1.0, (X,), **QUICK))


CALLS = {
    "args None": {"args": None},
    "args a dict": {"args": {"x": X}},
    "args a str": {"args": "x"},
    "args a number": {"args": 3},
    "args a generator": {"args": (x for x in [X])},
    "args an array": {"args": np.ones(3)},
    "kwargs a list": {"kwargs": [("x", X)]},
    "kwargs a tensor": {"kwargs": X},
    "kwargs a str": {"kwargs": "x"},
    "kwargs with a number as key": {"kwargs": {3: X}},
}


@pytest.mark.parametrize("wrong", CALLS.values(), ids=CALLS)
def test_calls(wrong):
    net = model()
    call = {"args": (X,), **wrong}
    for run in (
        lambda: plan(net, 1.0, **call, **QUICK),
        lambda: plan_units(net, 1.0, **call, **QUICK),
        lambda: sweep(net, None, **call, **QUICK),
        lambda: apply(planned().plan, net, **call),
        lambda: verify(planned(), **call),
        lambda: max_batch(lambda n: (call["args"], call.get("kwargs", {})), net, "1GiB", **QUICK),
    ):
        assert "args" in check(InputError, run)


SECONDS = [-1, 0, 0.0, math.nan, math.inf, "10", None, True, 1j, torch.tensor(1.0), [10]]


@pytest.mark.parametrize("limit", SECONDS, ids=label)
def test_time_limits(limit):
    net = model()
    for call in (
        lambda: plan(net, 1.0, (X,), effort=limit, **QUICK),
        lambda: plan_units(net, 1.0, (X,), effort=limit, **QUICK),
        lambda: sweep(net, None, (X,), effort=limit, **QUICK),
        lambda: max_batch(lambda n: ((X[:n],), {}), net, "1GiB", effort=limit, **QUICK),
        lambda: planned().plan.explain(effort=limit),
    ):
        assert "effort" in check(InputError, call)


@pytest.mark.parametrize("limit", [1, np.float32(1.0), np.int64(1), 10**9, LONG], ids=label)
def test_time_limits_that_are_read(limit):
    assert plan(model(), 1.0, (X,), effort=limit, **QUICK)


COUNTS = [0, -1, 1.5, "8", True, None, math.nan, LONG, np.float64(2.0), [2]]


@pytest.mark.parametrize("count", COUNTS, ids=label)
def test_counts(count):
    net, made = model(), planned().plan
    for call in (
        lambda: plan(net, 1.0, (X,), num_stages=count, **QUICK),
        lambda: plan_units(net, 1.0, (X,), num_stages=count, **QUICK),
        lambda: apply(made, net, (X,), num_stages=count),
        lambda: swept().verify(count),
        lambda: verify(planned(), (X,), rounds=count),
        lambda: swept().verify(1, rounds=count),
    )[: 4 if count == 0 else None]:  # rounds=0: outputs and gradients, without times
        assert "give an integer" in check(InputError, call)
    check(BudgetError, lambda: sweep(net, None, (X,), points=count, **QUICK))


def test_counts_that_are_read():
    assert plan(model(), 1.0, (X,), num_stages=np.int32(3), **QUICK).step.num_stages == 3


@pytest.mark.parametrize("flag", ["strict", "dynamic", "progress", "master_weights", "compile"])
@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)], ids=label)
def test_flags(flag, value):
    options = {**QUICK, flag: value}
    assert flag in check(InputError, lambda: plan(model(), 1.0, (X,), **options))


OPTIONS = {
    "loss": [True, 1.5, [0], nn.Linear, b"loss", torch.tensor(1)],
    "opaque": [None, 3, [nn.Linear(1, 1)], {"a": 1}, b"body", ["nothing"], "nothing"],
    "device": [3, torch.device("cpu"), ["H100"], "x" * 500, nn.Linear],
    "optimizer": [3, ["adamw"], torch.optim.SGD(nn.Linear(1, 1).parameters()), "adamww", lambda parameters: None, int],
    "reserve": [-1, "-1GiB", None, 1.5, LONG],
    "costs": ["free", 3, ["measure"], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values], ids=label)
def test_options(name, value):
    check((InputError, BudgetError), lambda: plan(model(), 1.0, (X,), **{**QUICK, name: value}))


def test_one_opaque_name_may_be_a_str():
    module = plan(model(), 1.0, (X,), opaque="1", **QUICK)
    assert [spec.module for spec in module.step.joint.opaque_calls.values()] == ["1"]


def test_nothing_set_aside():
    assert plan(model(), 1.0, (X,), reserve="0", **QUICK).plan.overhead == 0


@pytest.mark.parametrize("wrong", [None, 3, {}, Plan, model()], ids=label)
def test_plans(wrong):
    assert "lan" in check(InputError, lambda: apply(wrong, model(), (X,)))


@pytest.mark.parametrize("path", ["plan.json", Path("plan.json")], ids=label)
def test_plans_in_files_that_do_not_exist(path):
    assert "cannot read plan file plan.json" in check(PlanFileError, lambda: apply(path, model(), (X,)))


def test_a_planned_module_is_no_plan():
    assert "module.plan" in check(InputError, lambda: apply(planned(), model(), (X,)))


@pytest.mark.parametrize("wrong", [None, "module", nn.Linear(2, 2), Plan, 3], ids=label)
def test_planned_modules(tmp_path, wrong):
    for call in (
        lambda: verify(wrong, (X,)),
        lambda: export_source(wrong, tmp_path / "m.py"),
        lambda: install(planned().original, wrong),
    ):
        assert "takes the module that plan() returned" in check(InputError, call)


@pytest.mark.parametrize("path", [None, 3, b"plan.json", "", "a\0b", ["plan.json"], nn.Linear], ids=label)
def test_paths(path):
    made = planned().plan
    for call in (
        lambda: made.save(path),
        lambda: Plan.load(path),
        lambda: made.plot(path),
        lambda: made.perfetto(path),
        lambda: made.html(path),
        lambda: Sweep.load(path),
        lambda: swept().save(path),
        lambda: swept().plot(path),
        lambda: swept().html(path),
        lambda: export_source(planned(), path),
    ):
        check(InputError, call)


def test_devices_of_ones_own():
    for wrong in ({"name": 3}, {"flops_per_s": "fast"}, {"flops_per_s": math.nan}, {"dtype_speed": 3}, {"launch_ns": -1}):
        fields = {"name": "mine", "flops_per_s": 1e12, "bytes_per_s": 1e12, "launch_ns": 1, **wrong}
        check(InputError, lambda fields=fields: DeviceModel(**fields))
    check(InputError, lambda: register_device("H100"))


@pytest.mark.parametrize("wrong", [None, 3, X, (X,), "inputs"], ids=label)
def test_what_makes_inputs(wrong):
    assert "make_inputs" in check(InputError, lambda: max_batch(wrong, model(), "1GiB", **QUICK))
    check(InputError, lambda: max_batch(lambda n: wrong, model(), "1GiB", **QUICK))


@pytest.mark.parametrize("made", [(X, X), (X,), (X, {}, 1)], ids=["two tensors", "one", "three"])
def test_what_inputs_were_made_is_said(made):
    assert "make_inputs(1) must return (args, kwargs), such as" in check(
        InputError, lambda: max_batch(lambda n: made, model(), "1GiB", **QUICK)
    )


def test_inputs_that_cannot_be_made():
    assert "make_inputs(1) raises KeyError" in check(InputError, lambda: max_batch(lambda n: {}[n], model(), "1GiB", **QUICK))


class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("not today")


class CannotBeCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("never")


def test_a_step_that_fails_has_no_children():
    assert "raises ValueError: not today" in check(InputError, lambda: plan_units(Fails(6, 2), 1.0, (X,), **QUICK))
    assert "cannot be copied" in check(InputError, lambda: plan_units(CannotBeCopied(6, 2), 1.0, (X,), **QUICK))


class Speechless:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", ["x" * 1000, LONG, -LONG, [LONG], Speechless(), torch.randn(100, 100), {"a": "b" * 500}], ids=type
)
def test_objects_are_shown_short(value):
    assert len(shown(value)) <= 80


def test_a_number_to_type_in_is_never_too_small():
    for nbytes in [*range(1, 3000), *(3**k for k in range(7, 39)), 2**20, 2**30 - 1, 2**40, 2**62 // 100]:
        text = enough_text(nbytes)
        assert nbytes <= parse_bytes(text) <= nbytes * 1.01 + 1
        assert parse_bytes(text.replace(" ", "")) == parse_bytes(text)


@pytest.mark.parametrize("needed", [1, 99, 12345, 10**9 + 7])
@pytest.mark.parametrize("most", [0, 1, 500, 10**7])
def test_the_smallest_budget_for_a_need(needed, most):
    margin = lambda budget: 0 if budget > 2 * needed else min(most, budget // 100)
    budget = smallest_budget(needed, margin)
    assert budget - margin(budget) >= needed > budget - 1 - margin(budget - 1)


def deep(width):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(12)]), torch.randn(64, width)


def named_budgets(error):
    """The rounded and the exact number that a message says to type."""
    rounded, exact = re.search(r"Raise (?:the budget|it) to ([\d.]+ \w+) \((\d+) bytes\)", str(error)).groups()
    assert int(exact) <= parse_bytes(rounded)
    return rounded, int(exact), rounded.replace(" ", "")


@pytest.mark.one_in(10)
@pytest.mark.parametrize("width", [60, 61, 62, 63])
@pytest.mark.parametrize("options", [{}, {"reserve": "10kB"}, {"optimizer": "adamw"}], ids=str)
def test_the_budget_named_is_enough(width, options):
    net, x = deep(width)
    options = {**QUICK, **options, "effort": 1.0}
    with pytest.raises(InfeasibleBudgetError, match=r"budget 0\.2 of the plain step's peak \(.*\) is below") as caught:
        plan(net, 0.2, (x,), **options)
    for budget in named_budgets(caught.value):
        made = plan(net, budget, (x,), **options).plan
        assert made.peak_bytes <= made.budget_bytes


def test_the_users_own_budget_is_named():
    net, x = deep(60)
    for budget, said in (
        ("100kB", "budget 100kB is below"),
        (1000, r"budget 1000 B \(a number without a unit is bytes\) is below"),
        ("1 KiB", "budget 1 KiB is below"),
    ):
        with pytest.raises(InfeasibleBudgetError, match=said):
            plan(net, budget, (x,), **QUICK, effort=0.5)
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan(net, 1000, (x,), **QUICK, effort=0.5)
    least = caught.value.floor_bytes
    with pytest.raises(InfeasibleBudgetError, match="are left free for the allocator") as caught:
        plan(net, least, (x,), **QUICK, effort=0.5)
    assert caught.value.budget_bytes == least


def test_the_budget_named_by_sweep_and_max_batch_is_enough():
    net, x = deep(61)
    options = {**QUICK, "effort": 1.0}
    with pytest.raises(InfeasibleBudgetError) as caught:
        sweep(net, [0.1, 0.2], (x,), **options)
    for budget in named_budgets(caught.value):
        assert sweep(net, [budget], (x,), **options).points
    make = lambda n: ((torch.randn(n, 61),), {})
    with pytest.raises(InfeasibleBudgetError, match=r"one sample does not fit: Raise .* budget 1kB") as caught:
        max_batch(make, net, "1kB", **options)
    for budget in named_budgets(caught.value):
        assert max_batch(make, net, budget, **options).batch >= 1
    smallest = swept().points[0].budget_bytes
    with pytest.raises((InfeasibleBudgetError, NoScheduleFoundError), match=f"{smallest} bytes"):
        swept().best(budget=100)
    assert swept().best(budget=smallest)


def test_the_budget_named_by_plan_units_is_enough():
    net, x = deep(30)
    options = {**QUICK, "effort": 1.0}
    with pytest.raises(NoScheduleFoundError) as caught:
        plan_units(net, "1kB", (x,), **options)
    for budget in named_budgets(caught.value):
        assert plan_units(net, budget, (x,), **options).peak_bytes <= parse_bytes(budget)


def test_a_schedule_that_was_not_found_names_what_was(monkeypatch):
    net, x = deep(60)
    monkeypatch.setattr("planner.solver.solve.floor", lambda graph: (1, 0))
    with pytest.raises(NoScheduleFoundError, match=r"no schedule within 100kB was found") as caught:
        plan(net, "100kB", (x,), **QUICK, effort=0.5)
    monkeypatch.undo()
    for budget in named_budgets(caught.value):
        assert plan(net, budget, (x,), **QUICK, effort=2.0)


FILE = """
import torch
from torch import nn

def build(batch=8):
    return nn.Sequential(*[nn.Sequential(nn.Linear(60, 60), nn.GELU()) for _ in range(12)]), (torch.randn(batch, 60),), {}

def batched(batch=8):
    return nn.Linear(60, 2), {"input": torch.randn(batch, 60)}, {}

def fails(batch=8):
    return {}["nothing"]
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "build", "--budget", "9" * 5000], "BudgetError"),
        (["plan", "build", "--budget", "0." + "9" * 5000 + "1.1"], "BudgetError"),
        (["plan", "build", "--budget", "nan"], "BudgetError"),
        (["plan", "build", "--budget", "1.0", "--effort", "nan"], "effort=nan"),
        (["plan", "build", "--budget", "1.0", "--effort", "-3"], "effort=-3.0"),
        (["plan", "build", "--budget", "1.0", "--reserve", "much"], "write the reserve as"),
        (["plan", "build", "--budget", "1kB"], "budget 1kB is below"),
        (["sweep", "build", "--points", "0"], "at least 1"),
        (["max-batch", "build", "--budget", "0.5"], "BudgetError"),
        (["plan", "batched", "--budget", "1.0"], "kwargs=batch"),
        (["plan", "fails", "--budget", "1.0"], r"KeyError: 'nothing' at net_file.py:12"),
    ],
)
def test_at_the_shell(tmp_path, capsys, arguments, said):
    file = tmp_path / "net_file.py"
    file.write_text(FILE)
    command, function, *rest = arguments
    costs = [] if "--costs" in rest else ["--costs", "estimate"]
    assert main([command, f"{file}:{function}", *rest, *costs]) == 1
    lines = without_stages(capsys.readouterr().err)
    assert len(lines) == 1 and said in lines[0] and len(lines[0]) < 1000, lines


def test_the_budget_named_at_the_shell_is_enough(tmp_path, capsys):
    file = tmp_path / "net_file.py"
    file.write_text(FILE)
    command = ["plan", f"{file}:build", "--costs", "estimate", "--effort", "1", "--budget"]
    assert main([*command, "1kB"]) == 1
    for budget in named_budgets(capsys.readouterr().err):
        assert main([*command, str(budget)]) == 0


@pytest.mark.parametrize("text", ["def build(:", "raise RuntimeError('at import')", "import nothing_of_this_name"])
def test_a_file_that_cannot_be_run_at_the_shell(tmp_path, capsys, text):
    file = tmp_path / "broken_file.py"
    file.write_text(f"\n{text}\n")
    assert main(["plan", f"{file}:build", "--budget", "1.0"]) == 1
    lines = without_stages(capsys.readouterr().err)
    assert len(lines) == 1 and "InputError" in lines[0] and "broken_file.py:2" in lines[0]


def test_nothing_of_the_model_changes():
    net = model()
    before = copy.deepcopy(net.state_dict())
    for wrong in ({"args": None}, {"args": (X,), "effort": -1}, {"args": (X,), "loss": 1.5}):
        check(InputError, lambda wrong=wrong: plan(net, 1.0, **wrong, **QUICK))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()) and net.training


def test_digits_are_still_limited_elsewhere():
    assert sys.get_int_max_str_digits() == 4300 and planner.plan is plan
