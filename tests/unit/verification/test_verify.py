"""verify: two successive steps of a plain and a planned copy, with the state that they leave, and times with their spread."""

from __future__ import annotations

import collections
import copy
import itertools
import random
import re
import threading
import warnings

import numpy
import pytest
import torch
from torch import nn

import planner
from planner import InputError, VerifyReport, install, plan, verify
from planner.runtime.guards.host_state import HostStateGuard
from planner.runtime.module import CheckpointedModule
from planner.verification.state import StateEntry, generators, largest_difference, same, set_generators, state_of
from tests.support.text import unwrapped

QUICK = {"costs": "estimate", "progress": False, "check": False}


class Stateful(nn.Module):
    """A body, and whatever `after(self, y)` does with the result."""

    def __init__(self, after, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.after = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), after
        self.register_buffer("count", torch.zeros(1))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.after(self, self.body(x))


def nothing(model, y):
    return y


@pytest.fixture
def unguarded(monkeypatch):
    """Changes of Python state are no mismatch: what verify finds is not found before."""
    monkeypatch.setattr(HostStateGuard, "mismatch", lambda self, **_: None)


def beside(change, **attributes):
    """A planned module whose copies' original forwards also do `change(model)`, as a plan that lost it would be."""
    model, x = Stateful(nothing, **attributes), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)

    def after(model, y):
        change(model)
        return y

    model.after = after
    return planned, x


CHANGES = {
    "a tensor": (lambda m: setattr(m, "mean", m.mean + 1), {"mean": torch.zeros(3)}, "attribute mean"),
    "a tensor in place": (lambda m: m.mean.add_(1), {"mean": torch.zeros(3)}, "attribute mean"),
    "None first": (lambda m: setattr(m, "mean", torch.ones(3)), {"mean": None}, "attribute mean"),
    "a tuple": (lambda m: setattr(m, "pair", (m.pair[1], m.pair[0] + 1)), {"pair": (torch.zeros(2),) * 2}, "attribute pair[1]"),
    "a list": (lambda m: m.queue.append(1), {"queue": []}, "attribute queue"),
    "a list of tensors": (lambda m: m.queue.append(m.queue.pop(0) + 1), {"queue": [torch.zeros(2)]}, "attribute queue[0]"),
    "a dict": (lambda m: m.memory.update(n=m.memory["n"] + 1), {"memory": {"n": 0}}, "attribute memory['n']"),
    "a deque": (lambda m: m.last.append(1), {"last": collections.deque([0], maxlen=1)}, "attribute last[0]"),
    "a set": (lambda m: m.seen.add(3), {"seen": set()}, "attribute seen"),
    "a type": (lambda m: setattr(m, "scale", 1.0), {"scale": 1}, "attribute scale"),
    "deep down": (lambda m: m.tree["a"][0].update(b=2), {"tree": {"a": ({"b": 1},)}}, "attribute tree['a'][0]['b']"),
    "an object": (
        lambda m: setattr(m.settings, "rate", 2),
        {"settings": type("Settings", (), {"__init__": lambda s: setattr(s, "rate", 1)})()},
        "attribute settings.rate",
    ),
    "an array": (lambda m: m.array.__iadd__(1), {"array": numpy.zeros(2)}, "attribute array"),
    "a counter": (lambda m: next(m.counter), {"counter": itertools.count()}, "attribute counter"),
    "a generator of its own": (lambda m: m.dice.random(), {"dice": random.Random(0)}, "attribute dice"),
    "numpy's own generator": (lambda m: m.dice.random(), {"dice": numpy.random.default_rng(0)}, "attribute dice"),
    "a submodule's": (lambda m: setattr(m.body[0], "calls", 1), {}, "attribute body.0.calls"),
    "a submodule's mode": (lambda m: m.body[1].eval(), {}, "attribute body.1.training"),
    "a module in a list": (lambda m: m.hidden[0].bias.data.add_(1), {"hidden": [nn.Linear(2, 2)]}, "parameter hidden[0].bias"),
    "a buffer": (lambda m: m.count.add_(1), {}, "buffer count"),
    "a new buffer": (lambda m: m.body.register_buffer("bias", torch.ones(2)), {}, "buffer body.bias"),
    "a parameter": (lambda m: m.body[0].weight.data.add_(0), {}, ""),
    "torch's generator": (lambda m: torch.rand(1), {}, "generator torch"),
    "Python's generator": (lambda m: random.random(), {}, "generator python"),
    "numpy's generator": (lambda m: numpy.random.rand(), {}, "generator numpy"),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", CHANGES)
def test_what_only_one_side_leaves_behind_is_named(unguarded, kind):
    change, attributes, name = CHANGES[kind]
    planned, x = beside(change, **copy.deepcopy(attributes))
    report = verify(planned, (x,), rounds=0)
    if name:
        assert not report.exact and name in report.differences, report
        assert f"DIFFERENT by up to {'inf' if report.largest_difference > 1e300 else ''}" in str(report)
    else:
        assert report.exact, report


def test_state_that_shows_in_the_second_output_only():
    class Ema(Stateful):
        def __init__(self):
            super().__init__(nothing, mean=torch.zeros(8))

        def forward(self, x):
            y = self.body(x) - self.mean
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y

    x = torch.randn(4, 8)
    exact, frozen = Ema(), Ema()
    planned = plan(frozen, 1.0, (x,), **QUICK)
    report = verify(planned, (x,), rounds=0)
    eager = [exact(x), exact(x)]
    steps = copy.deepcopy(planned)
    same_twice = torch.equal(eager[0], steps(x)) and torch.equal(eager[1], steps(x)) and same(exact.mean, steps.original.mean)
    assert report.exact == same_twice, report


def test_an_exact_plan_is_exact_over_both_steps_and_nothing_of_the_model_changes():
    model, x = Stateful(nothing, memory={"n": [1, 2.0, float("nan")]}), torch.randn(4, 8, requires_grad=True)
    planned = plan(model, 1.0, (x,), **QUICK)
    for tensor in (x, *model.parameters()):
        tensor.grad = torch.full_like(tensor, 3.0)
    before, states = state_of(copy.deepcopy(model)), generators()
    report = verify(planned, (x,), rounds=0)
    assert report.exact and report.num_steps == 2 and not report.unplanned and report.within_budget
    assert "in 2 successive steps" in unwrapped(report)
    assert all(leaf.grad.eq(3).all() for leaf in (x, *model.parameters()))
    assert all(same(leaf, before[name]) for name, leaf in state_of(model).items())
    assert all(torch.equal(a, b) for a, b in [(generators()["torch"], states["torch"])])
    assert generators()["python"] == states["python"]


def test_a_copy_that_does_not_run_planned_is_an_error(monkeypatch):
    model, x = Stateful(nothing), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)
    monkeypatch.setattr(CheckpointedModule, "__deepcopy__", lambda self, memo: out_of_step(self, memo))

    def out_of_step(module, memo):
        twin = CheckpointedModule(copy.deepcopy(module.original, memo), module.step, module.plan)
        twin.original.body[0].eval()
        return twin

    with pytest.raises(InputError, match=r"a deep copy of this model does not run planned: training mode .*body\.0"):
        verify(planned, (x,), rounds=0)


def test_steps_that_ran_unplanned_are_listed():
    model, x = Stateful(nothing), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)
    planned.register_forward_hook(lambda module, args, out: module.body[0].eval() and None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = verify(planned, (x,))
    assert len(report.unplanned) == 1 and report.unplanned[0].startswith("step 2, because training mode of body.0 is ")
    assert "          unplanned: step 2" in str(report)
    assert report.measured_peak_bytes == verify(plan(Stateful(nothing), 1.0, (x,), **QUICK), (x,), rounds=0).measured_peak_bytes


def test_a_strict_plan_is_verified_as_any_other():
    model, x = Stateful(nothing), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), strict=True, **QUICK)
    planned.register_forward_hook(lambda module, args, out: module.body[0].eval() and None)
    assert verify(planned, (x,), rounds=0).unplanned and planned.strict


def test_calls_are_counted():
    model, x = Stateful(nothing), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)
    for _ in range(2):
        planned(x)
    with pytest.warns(planner.MismatchWarning):
        planned(x[:2])
    assert (planned.num_planned_calls, planned.num_unplanned_calls) == (2, 1)
    twin = copy.deepcopy(planned)
    assert (twin.num_planned_calls, twin.num_unplanned_calls) == (0, 0)


def test_an_installed_plan_is_compared_with_the_models_own_forward(unguarded):
    planned, x = beside(lambda m: setattr(m, "left", 1))
    install(planned.original, planned)
    assert "attribute left" in verify(planned, (x,), rounds=0).differences


def test_tensors_that_a_forward_left_with_their_graph_do_not_hinder():
    model, x = Stateful(nothing, aux=None), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)
    model.aux, model.deep = model.body(x).sum(), [{"aux": model.body(x)}]
    report = verify(planned, (x,), rounds=0)
    assert report.num_compared and not any("deep" in name for name in report.differences)
    assert model.aux.grad_fn is not None


def test_inputs_with_a_history_keep_it():
    model, leaf = Stateful(nothing), torch.randn(4, 8, requires_grad=True)
    x = leaf * 2
    report = verify(plan(model, 1.0, (x,), **QUICK), (x,), rounds=0)
    assert report.exact and leaf.grad is None and x.grad_fn is not None
    x.sum().backward()
    assert leaf.grad.eq(2).all()


def test_a_model_that_cannot_be_copied_is_an_error_that_says_so():
    model, x = Stateful(nothing, lock=threading.Lock()), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)
    with pytest.raises(InputError, match="the model cannot be copied, so no step of it can be run beside it: TypeError"):
        verify(planned, (x,))


@pytest.mark.parametrize(("rounds", "pairs"), [(0, 0), (1, 5), (5, 5), (6, 6)])
def test_time_is_a_median_with_its_spread_or_none(rounds, pairs):
    model, x = Stateful(nothing), torch.randn(4, 8)
    report = verify(plan(model, 1.0, (x,), **QUICK), (x,), rounds=rounds)
    assert report.num_pairs == pairs
    if not pairs:
        assert report.time_ratio is None and "step time not measured" in str(report)
        return
    low, high = report.time_spread
    assert 0 < low <= report.time_ratio <= high and 0 < report.noise[0] <= report.noise[1]
    span = r"\d+\.\d\d-\d+\.\d\d"
    text = rf"step time \d+\.\d\dx plain \(median of {pairs} pairs, {span}; plain against itself {span}\)"
    assert re.search(text, unwrapped(report))


def test_where_the_plain_step_does_not_fit_only_the_planned_one_is_measured(unguarded, monkeypatch):
    class Large(Stateful):
        def forward(self, x):
            return super().forward(x)

    model, x = Large(nothing), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), **QUICK)

    def too_large(self, x):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Large, "forward", too_large)
    report = verify(planned, (x,))
    assert report.plain_peak_bytes is None and report.time_ratio is None and not report.exact
    assert report.measured_peak_bytes > 0 and "plain did not fit" in unwrapped(report)


def test_the_former_name_of_the_report_still_works():
    with pytest.warns(DeprecationWarning, match="VerifyReport"):
        assert planner.Report is VerifyReport


OUTPUT = StateEntry("output", "0")


def test_values_are_equal_by_type_and_tensors_by_bits():
    nan = float("nan")
    for one, other in [(1, 1.0), (True, 1), (0.0, nan), ((1,), [1]), ([1], [1, 1]), (torch.zeros(1), torch.zeros(1, 1))]:
        assert not same(one, other) and same(one, copy.deepcopy(one))
    assert same([nan], [float("nan")]) and same(torch.tensor(nan), torch.tensor(nan))
    assert not same(torch.zeros(1), -torch.zeros(1)), "the sign of zero is a bit"
    assert not same(torch.zeros(1), torch.zeros(1, requires_grad=True))
    assert same(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())
    turned = torch.tensor([1 + 2j]).conj()
    assert same(turned, turned.resolve_conj())
    assert largest_difference({OUTPUT: torch.tensor([1.0, 4.0])}, {OUTPUT: torch.tensor([1.0, 3.0])}) == 0.25


def test_differences_of_inputs_and_of_their_gradients_are_shares_of_their_own_kinds():
    far, near = torch.tensor([100.0]), torch.tensor([1.0])
    expected = {StateEntry("input", "0"): far, StateEntry("input gradient", "0"): near}
    assert largest_difference(expected, expected | {StateEntry("input gradient", "0"): near / 2}) == 0.5


def test_a_model_that_holds_itself_is_taken_apart_once():
    model = Stateful(nothing)
    model.around = [model]
    model.around.append(model.around)
    assert StateEntry("attribute", "around[0]") in state_of(model)


def test_generators_are_put_back():
    before = generators()
    expected = torch.rand(3), random.random(), numpy.random.rand()
    set_generators(before)
    assert torch.equal(expected[0], torch.rand(3)) and expected[1:] == (random.random(), numpy.random.rand())
