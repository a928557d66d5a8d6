"""Every option once: signatures, defaults, help and the command line agree with PlanOptions."""

import argparse
import inspect

import pytest
import torch
from torch import nn

import planner
from planner import BudgetError, InputError, Plan, PlanOptions, options
from planner.cli import arguments, explain, export, max_batch, plan, solve, sweep
from planner.graph.provenance import Provenance
from planner.limits import Limits
from planner.options import OPTIONS, ApplyKeywords, MaxBatchKeywords, PlanKeywords, SweepKeywords, read_options
from planner.runtime.step import DEFAULT_STAGES

TAKEN = {
    planner.profile: PlanKeywords,
    planner.plan: PlanKeywords,
    planner.apply: ApplyKeywords,
    planner.sweep: SweepKeywords,
    planner.max_batch: MaxBatchKeywords,
}
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def keyword_defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_the_options_of_plan_are_all_there_are():
    assert set(PlanKeywords.__annotations__) == set(OPTIONS)
    assert set(OPTIONS) == set(inspect.signature(PlanOptions).parameters)
    for keywords in TAKEN.values():
        assert set(keywords.__annotations__) <= set(OPTIONS)


@pytest.mark.parametrize("function", TAKEN, ids=lambda function: function.__name__)
def test_signatures_have_the_names_and_defaults_of_the_options(function):
    keywords = TAKEN[function]
    assert function.__annotations__["options"] == f"Unpack[{keywords.__name__}]", "what editors see is what is documented"
    shown = keyword_defaults(function)
    own = {"points", "low", "high"} if function is planner.sweep else set()
    assert set(shown) - own == set(keywords.__annotations__)
    for name in keywords.__annotations__:
        assert shown[name] == OPTIONS[name].default


@pytest.mark.parametrize("keywords", dict.fromkeys(TAKEN.values()), ids=lambda keywords: keywords.__name__)
def test_keywords_have_the_types_of_the_options(keywords):
    for name, annotation in keywords.__annotations__.items():
        assert annotation.__forward_arg__ == OPTIONS[name].type, name


@pytest.mark.parametrize("function", [planner.plan_units, Plan.explain], ids=lambda function: function.__name__)
def test_signatures_that_are_written_out_have_the_same_defaults(function):
    shared = {name: default for name, default in keyword_defaults(function).items() if name in OPTIONS}
    assert "effort" in shared
    assert shared == {name: OPTIONS[name].default for name in shared}


def test_defaults_of_lower_rooms():
    assert PlanOptions().limits == Limits()
    assert PlanOptions().num_stages == DEFAULT_STAGES


@pytest.mark.parametrize("function", TAKEN, ids=lambda function: function.__name__)
def test_help_describes_every_option_once(function):
    for name in TAKEN[function].__annotations__:
        help = OPTIONS[name].metadata["help"]
        assert help and not help.endswith(".")
        assert " ".join(inspect.getdoc(function).split()).count(f" {name}: {help}") == 1


@pytest.mark.parametrize("command", [plan, sweep, max_batch, export, explain, solve], ids=lambda command: command.__name__)
def test_the_command_line_has_the_defaults_and_help_of_the_options(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    taken = {action.dest: action for action in parser._actions if action.dest in OPTIONS}
    assert {"effort", "time_limit_s"} <= set(taken)
    assert command is solve or set(arguments.MODEL_OPTIONS) <= set(taken)
    for name, action in taken.items():
        assert action.default == OPTIONS[name].default or (name == "opaque" and action.default is None)
        assert action.help.startswith(OPTIONS[name].metadata["help"])


def test_options_of_the_command_line_reach_the_planner():
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    given = "m.py:f --budget 0.5 --loss 1 --opaque a --opaque b.c --reserve 1KiB --effort 2 --time-limit-s 3 --no-check"
    read = arguments.checked_options(parser.parse_args(given.split()), (*arguments.MODEL_OPTIONS, "check"))
    checked = PlanOptions(**read)
    assert (checked.loss, checked.opaque, checked.reserve_bytes, checked.check) == (1, ("a", "b.c"), 1024, False)
    assert checked.limits == Limits(2.0, 3.0)


def test_costs_of_a_device_that_is_not_here_cannot_be_measured():
    with pytest.raises(InputError, match=r"device='H100' is not here: leave costs out"):
        planner.profile(nn.Linear(6, 2), (X,), costs="measure", device="H100")
    with pytest.raises(InputError, match="leave device out to measure here"):
        planner.max_batch(lambda n: ((X[:n],), {}), nn.Linear(6, 2), "1GiB", costs="measure", device="H100")


def test_costs_are_measured_here_and_estimated_for_a_device_that_is_not():
    def costs(**given) -> Provenance:
        return planner.profile(nn.Linear(6, 2), (X,), progress=False, **given).provenance

    assert costs().costs == costs(costs="measure").costs == "measured"
    there = costs(device="H100")
    assert there == costs(device="H100", costs="estimate") and there.is_estimated and not there.is_here


@pytest.mark.parametrize("function", TAKEN, ids=lambda function: function.__name__)
def test_an_unknown_option_is_named_with_the_closest_one(function):
    said = rf"^{function.__name__}\(\) got an unexpected keyword argument"
    with pytest.raises(TypeError, match=rf"{said} 'los'; did you mean 'loss'\?$"):
        function(None, None, None, los=1)
    with pytest.raises(TypeError, match=rf"{said} 'zzzz'$"):
        function(None, None, None, zzzz=1)


def test_an_option_of_another_function_is_refused():
    for name in ("strict", "check", "also"):
        with pytest.raises(TypeError, match=name):
            read_options({name: OPTIONS[name].default}, SweepKeywords, "sweep")


@pytest.mark.parametrize("also", ["calls", 3, [X], [(X,)], [((X,), {}, {})], [({"x": X}, {})], [((X,), {3: X})]], ids=range(7))
def test_other_calls_are_checked(also):
    with pytest.raises(InputError, match=r"also|args"):
        PlanOptions(also=also)


def test_what_makes_no_sense_is_refused_before_the_model_is_captured(monkeypatch):
    monkeypatch.setattr("planner.captured.capture", lambda *_, **__: pytest.fail("captured"))
    with pytest.raises(BudgetError, match="reserve"):
        planner.plan(nn.Linear(6, 2), 1.0, (X,), reserve="much")
    with pytest.raises(BudgetError, match="budget"):
        planner.plan(nn.Linear(6, 2), "much", (X,))
    with pytest.raises(InputError, match="strict"):
        planner.profile(nn.Linear(6, 2), (X,), strict=1)


def test_groups_hold_every_option_once():
    named = [field for group in options.GROUPS for field in group.__annotations__]
    assert len(named) == len(set(named)) == len(OPTIONS)
