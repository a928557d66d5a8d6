"""What planning, copies and audits must leave as they found it; and options that copies must not lose."""

from __future__ import annotations

import array
import copy
import pickle
from collections import OrderedDict, deque
from contextlib import nullcontext
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from planner import CaptureError, PlanAuditError, install, plan
from planner.runtime.guards.mismatch import Mismatch
from planner.tracer.host.preserve import Preserved
from tests.support import world
from tests.support.training import assert_same, trajectory

QUICK = {"costs": "estimate", "progress": False}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
UNSET: ContextVar[object] = ContextVar("unset")
SET: ContextVar[object] = ContextVar("set")


class Guarded(OrderedDict):
    def update(self, *args, **kwargs):
        raise RuntimeError("no update")

    def clear(self):
        raise RuntimeError("no clear")


CONTAINERS = {
    "list": ([1, 2], lambda v: v.append(3)),
    "deque with a bound": (deque([1, 2], maxlen=2), lambda v: v.append(3)),
    "dict": ({"a": 1, "b": 2}, lambda v: v.update(a=3)),
    "order of a dict": (OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "dict without update": (Guarded(a=1), lambda v: v.__setitem__("b", 2)),
    "set": ({1, 2}, lambda v: v.add(3)),
    "bytearray": (bytearray(b"ab"), lambda v: v.__setitem__(0, 65)),
    "numpy array": (np.ones(2), lambda v: v.__setitem__(0, 5)),
    "array of the standard library": (array.array("i", [1, 2]), lambda v: v.__setitem__(0, 5)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_kind_of_container_is_put_back(name):
    value, change = CONTAINERS[name]
    before, after = copy.deepcopy(value), []
    preserved = Preserved()
    preserved.keep(value)
    preserved.keep(after)  # what comes behind one is put back, too
    change(value)
    after.append(1)
    assert preserved.restore() and after == []
    assert type(value) is type(before) and list(value) == list(before) and str(value) == str(before)


class Proxy:
    """Shows another object's attributes as its own, as `list[int]` shows those of `list`."""

    __slots__ = ("target",)

    def __init__(self, target):
        self.target = target

    @property
    def __dict__(self):
        return vars(self.target)


@pytest.mark.parametrize("value", [list[int], Proxy(nn.Module), Proxy(list)], ids=["alias", "module", "class"])
def test_objects_that_show_anothers_attributes_are_read_and_put_back(value):
    holder = [value]
    preserved = Preserved()
    preserved.keep(holder)
    preserved.keep(value)
    assert not preserved.restore()
    holder.append(1)
    assert preserved.restore() and holder == [value]


def test_a_model_that_holds_a_generic_alias_trains_as_before():
    class Typed(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.kind = list[int]

        def forward(self, x):
            return (super().forward(x) * (2.0 if self.kind == list[int] else 3.0)).sum()

    net = Typed()
    planned = plan(copy.deepcopy(net), 1.0, (X,), **QUICK)
    assert_same(trajectory(net, (X,), {}), trajectory(planned, (X,), {}))  # its second step is audited


class Writes(nn.Module):
    """Calls `write` on itself in its forward."""

    def __init__(self, write):
        super().__init__()
        self.layer, self.write = nn.Linear(8, 8), write
        self.ema, self.bytes, self.ints = torch.ones(8), bytearray(b"a"), array.array("i", [0])

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return (self.layer(x) * self.ema).sum()


WRITES = {
    "out=": lambda m: torch.mul(m.ema, 0.5, out=m.ema),
    "out= of a view": lambda m: torch.mul(m.ema[:4], 0.5, out=m.ema[2:6]),
    "in place": lambda m: m.ema.mul_(0.5),
    "foreach": lambda m: torch._foreach_mul_([m.ema], 0.5),
    "a bytearray": lambda m: m.bytes.__setitem__(0, m.bytes[0] + 1),
    "an array": lambda m: m.ints.__setitem__(0, m.ints[0] + 1),
    "a context variable": lambda m: SET.set(m),
    "a context variable without a value": lambda m: UNSET.set(m),
}
REFUSED = {
    "out= of a view": r"model\(\*args, \*\*kwargs\) at test_restored.py:[0-9]+ raises RuntimeError",
    "a bytearray": "the model's forward changes its attribute bytes",
    "an array": "the model's forward changes its attribute ints",
}
"""What no plan can hold, and why."""


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", WRITES)
def test_what_a_forward_writes_while_it_is_planned_is_put_back(name):
    model, missing = Writes(WRITES[name]), object()
    SET.set(missing)
    held = model.ema
    with pytest.raises(CaptureError, match=REFUSED[name]) if name in REFUSED else nullcontext():
        plan(model, 1.0, (X,), **QUICK)
    assert model.ema is held and torch.equal(held, torch.ones(8))
    assert model.bytes == b"a" and model.ints[0] == 0
    assert SET.get() is missing and UNSET.get(missing) is missing


class Two(nn.Module):
    """A tensor and a number that change from call to call, in one list."""

    def __init__(self, number_first):
        super().__init__()
        self.layer, self.first = nn.Linear(8, 8), number_first
        self.state = [0, torch.zeros(8)] if number_first else [torch.zeros(8), 0]

    def forward(self, x):
        i, j = (1, 0) if self.first else (0, 1)
        out = self.layer(x) + self.state[i]
        self.state[i] = out.detach().mean(0)
        self.state[j] += 1
        return out.sum()


@pytest.mark.parametrize("number_first", [True, False])
def test_a_number_that_changes_beside_a_tensor_is_refused(number_first):
    with pytest.raises(CaptureError, match=r"state\[\d\]"):
        plan(Two(number_first), 1.0, (X,), **QUICK)


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))], ids="dcp")
@pytest.mark.parametrize("installed", [False, True])
def test_copies_are_in_the_mode_of_the_model_and_audited_as_it_is(copied, installed):
    model = block()
    planned = plan(model, 1.0, (X,), audit=False, **QUICK)
    if installed:
        install(model, planned)
    model.eval()
    made = copied(model if installed else planned)
    made(X)
    original = made if installed else made.original
    assert not any(module.training for module in original.modules())
    modules = made.forward.planned if installed and hasattr(made.forward, "planned") else [made] if not installed else []
    assert not any(module.audits for module in modules)


def test_steps_of_other_sizes_are_audited_as_the_first():
    planned = plan(nn.Sequential(nn.Linear(8, 8)), 1.0, (X,), audit=False, dynamic=True, **QUICK)
    planned(X[:2])
    assert planned._other_sizes.known and not any(other.audits for other in planned._other_sizes.all())


def test_a_container_that_holds_itself_is_copied():
    model = block()
    model.tree = {}
    model.tree["me"] = [model.tree]
    made = copy.deepcopy(plan(model, 1.0, (X,), **QUICK))
    assert made.original.tree["me"][0] is made.original.tree


def test_an_installed_plan_that_an_audit_refused_is_an_audits_error_where_it_is_strict():
    model = block()
    planned = plan(model, 1.0, (X,), **QUICK)
    install(model, planned, strict=True)
    planned.__dict__["_refused"] = Mismatch("audit", "the audit", text="the audit: the planned forward gave another output 0")
    with pytest.raises(PlanAuditError, match="another output 0"):
        model(X)


def test_numpys_generator_may_be_of_any_kind():
    with world.kept():
        before = np.random.get_bit_generator()
        try:
            np.random.set_bit_generator(np.random.PCG64(1))
            state = str(np.random.get_state(legacy=False))
            model = Writes(lambda module: None)
            planned = plan(model, 1.0, (X,), **QUICK)
            assert str(np.random.get_state(legacy=False)) == state
            assert_same(trajectory(copy.deepcopy(model), (X,), {}), trajectory(planned, (X,), {}))
        finally:
            np.random.set_bit_generator(before)


def test_fake_tensors_can_be_planned_for_a_device_that_is_not_here():
    with FakeTensorMode():
        model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU()), torch.randn(4, 8)
    assert plan(model, 1.0, (x,), device="H100-80GB", progress=False).plan.check == "not run: the device is not here"
