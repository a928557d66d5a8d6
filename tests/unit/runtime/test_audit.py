"""The audit finds what a guard does not: each guard is switched off in turn, and what it guards is changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

from planner import CaptureError, MismatchWarning, PlanAuditError, plan
from planner.profiler.memory import logical_peak
from planner.runtime.audit import difference, digest, is_due
from planner.runtime.guards import call
from planner.runtime.guards.host_state import HostStateGuard
from planner.runtime.guards.library import LibraryGuard
from planner.runtime.guards.model_state import ModelStateGuard
from planner.runtime.module import CheckpointedModule
from planner.tracer.host.fingerprint import Fingerprints
from planner.tracer.host.state import HostState

X = torch.linspace(-1, 1, 32).reshape(4, 8)
GLOBAL = 1.0


class Model(nn.Module):
    """A little of everything that a guard looks at."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.drop, self.scale, self.settings = nn.Dropout(0.2), 2.0, {"shift": [0.5]}

    def forward(self, x, power=2, mask=None):
        x = self.drop(self.second(torch.tanh(self.first(x)))) * self.scale * GLOBAL + self.settings["shift"][0]
        if mask is not None and mask.all():
            x = x * 3
        return x**power + torch.ones(8)


def replace_second(model):
    model.second = nn.Linear(8, 8)


def untie(model):
    model.second.weight = nn.Parameter(torch.ones(8, 8))


def double(model):
    model.first.register_forward_hook(lambda _module, _args, out: 2 * out)


def become_identity(model):
    model.drop.__class__ = nn.Identity


def set_global(_model):
    globals()["GLOBAL"] = 3.0


CASES = {
    "host: attribute": ([(HostStateGuard, "mismatch", lambda self, **_: None)], lambda m: setattr(m, "scale", 3.0), {}),
    "host: container": (
        [(HostStateGuard, "mismatch", lambda self, **_: None)],
        lambda m: m.settings["shift"].append(m.settings["shift"].pop() + 1),
        {},
    ),
    "host: global": ([(HostStateGuard, "mismatch", lambda self, **_: None)], set_global, {}),
    "host: training": ([(HostStateGuard, "mismatch", lambda self, **_: None)], lambda m: m.drop.eval(), {}),
    "submodules": ([(ModelStateGuard, "_submodules", lambda self: self._children)], replace_second, {}),
    "hooks": ([(ModelStateGuard, "mismatch", lambda self, **_: None)], double, {}),
    "class": ([(ModelStateGuard, "mismatch", lambda self, **_: None)], become_identity, {}),
    "ties": ([(ModelStateGuard, "untied", lambda self, held: "")], untie, {}),
    "arguments": ([(call, "alike", lambda expected, now: True)], None, {"power": 3}),
    "values": ([(call, "reads_difference", lambda joint, run_guards, inputs: None)], None, {"mask": torch.ones(2) > 0}),
}


@pytest.fixture
def planned():
    torch.manual_seed(0)
    model = Model().train()
    kwargs = {"power": 2, "mask": torch.zeros(2) > 0}
    yield plan(model, 1.0, (X,), kwargs, costs="estimate", progress=False)
    globals()["GLOBAL"] = 1.0


def called(module, num_call, **kwargs):
    """The planned call of this number."""
    module.__dict__["num_runs"] = num_call - 1
    return module(X, **{"power": 2, "mask": torch.zeros(2) > 0, **kwargs})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_call", [2, 10, 1000])
def test_the_next_audit_finds_what_a_guard_that_is_switched_off_does_not(planned, monkeypatch, name, num_call):
    switched_off, change, kwargs = CASES[name]
    for owner, attribute, blind in switched_off:
        monkeypatch.setattr(owner, attribute, blind)
    if change is not None:
        change(planned.original)
    called(planned, 1, **kwargs)
    state = torch.get_rng_state()
    expected = copy.deepcopy(planned.original)(X, **{"power": 2, "mask": torch.zeros(2) > 0, **kwargs})
    torch.set_rng_state(state)
    with pytest.warns(MismatchWarning, match="the audit: the planned forward gave another output"):
        found = called(planned, num_call, **kwargs)
    assert torch.equal(expected, found)  # the original's result
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(planned, 3, **kwargs)
    assert planned.num_planned_calls == 1  # unplanned from then on, and said once


def test_strict_makes_it_an_error(planned, monkeypatch):
    monkeypatch.setattr(HostStateGuard, "mismatch", lambda self, **_: None)
    planned.strict, planned.original.scale = True, 3.0
    with pytest.raises(PlanAuditError, match="output 0"):
        called(planned, 2)


def test_a_mode_that_no_guard_reads_is_found(planned, monkeypatch):
    monkeypatch.setattr(call, "autocast_key", lambda device: planned.step.key.autocast)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(MismatchWarning, match="audit"):
        called(planned, 2)


class Left(nn.Module):
    """Leaves a tensor behind and draws."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.mean = nn.Linear(8, 8), nn.BatchNorm1d(8), torch.zeros(8)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(self.layer(x)), 0.5) - self.mean
        self.mean, self.aux = 0.9 * self.mean + 0.1 * x.detach().mean(0), x.square().mean()
        return x


def test_state_that_a_plan_would_not_write_is_found(monkeypatch):
    model = Left().train()
    module = plan(model, 1 << 20, (X,), costs="estimate", progress=False)  # with room for the audit's copies
    monkeypatch.setattr("planner.runtime.outputs.write_state", lambda *_: None)
    module.__dict__["num_runs"] = 1
    with pytest.warns(MismatchWarning, match="mean"):
        module(X)


def test_an_audited_call_is_as_any_other():
    torch.manual_seed(0)
    model = Left().train()
    twin = copy.deepcopy(model)
    module = plan(model, 1.0, (X,), costs="estimate", progress=False)
    results = []
    for forward, owner in ((twin, twin), (module, model)):
        torch.manual_seed(1)
        for _ in range(11):  # audits at the 2nd and the 10th
            out = forward(X)
            (out.sum() + owner.aux).backward()
        results.append([out, owner.mean, owner.aux, torch.get_rng_state(), *owner.state_dict().values()])
        results[-1] += [p.grad for p in owner.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert module.num_planned_calls == 11


@pytest.mark.filterwarnings("ignore:.*forwards wait")  # what a call leaves on the model holds its graph
def test_audits_can_be_switched_off(monkeypatch):
    model = Left().train()
    module = plan(model, 1.0, (X,), costs="estimate", progress=False, audit=False)
    monkeypatch.setattr(CheckpointedModule, "_audit", lambda *_: pytest.fail("audited"))
    for _ in range(11):
        module(X)
    assert module.num_planned_calls == 11


def test_audits_are_due_by_the_number_of_the_call_alone():
    assert [n for n in range(1, 20_000) if is_due(n)] == [2, 10, 100, 1000, 10_000]


class Unsteady(nn.Module):
    """Never does the same twice: no accusation, no plan."""

    def __init__(self):
        super().__init__()
        self.layer, self.count = nn.Linear(8, 8), 0

    def forward(self, x):
        self.count += 1
        return self.layer(x) * self.count


def test_what_is_never_the_same_is_no_accusation(planned, monkeypatch):
    with pytest.raises(CaptureError, match="count"):
        plan(Unsteady().train(), 1.0, (X,), costs="estimate", progress=False)
    draws = iter(range(100))
    honest = Fingerprints.of
    monkeypatch.setattr(Fingerprints, "of", lambda self, value: (honest(self, value), next(draws)))
    monkeypatch.setattr(HostStateGuard, "mismatch", lambda self, **_: None)
    monkeypatch.setattr(LibraryGuard, "mismatch", lambda self: None)
    monkeypatch.setattr(call, "alike", lambda expected, now: True)
    planned.__dict__["num_runs"] = 1
    planned(X, power=2, mask=torch.zeros(2) > 0)  # digests differ from run to run: nothing can be said
    assert planned.num_planned_calls == 1


def test_an_audited_call_under_autocast_keeps_the_budget():
    """Autocast's cache holds a cast of every weight until its region ends."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU())), nn.Linear(64, 1))
    x = torch.randn(128, 64)
    with torch.autocast("cpu", torch.bfloat16):
        planned = plan(net, 0.85, (x,), progress=False)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            out = planned(x)
        out.float().sum().backward()

    step()
    planned.zero_grad(set_to_none=True)
    peak = planned.plan.graph.resident_bytes + logical_peak(step, torch.device("cpu"))
    assert planned.num_planned_calls == 2, "the audited one"
    assert peak <= planned.plan.budget_bytes


class Settings:
    def __init__(self):
        self.values = [1.0, {"k": 2.0}]


def test_what_many_modules_hold_is_looked_at_once(monkeypatch):
    """And a change in it is told at each of them."""
    model, settings = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))), Settings()
    for module in model:
        module.settings = settings
    looked = []
    of_object = Fingerprints._of_object
    monkeypatch.setattr(Fingerprints, "_of_object", lambda self, value: looked.append(value) or of_object(self, value))
    before = digest(model, (), (), torch.device("cpu"), HostState())
    assert sum(value is settings for value in looked) == 1
    settings.values[1]["k"] = 3.0
    after = digest(model, (), (), torch.device("cpu"), HostState())
    assert difference(before, after) == tuple(f"{i}.settings" for i in range(5))
    assert difference(after, digest(model, (), (), torch.device("cpu"), HostState())) == ()
