"""What guards have to reach: places empty or absent at planning, derived classes, attributes of containers."""

from __future__ import annotations

import array
import copy
import functools
import operator
import types
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

from planner import MismatchWarning, PlannerError, plan
from planner.tracer.host import reads
from planner.tracer.host.fingerprint import Fingerprints
from planner.tracer.host.preserve import Preserved
from tests.support.training import assert_same, trajectory


class Number(float):
    pass


class Whole(int):
    pass


class Text(str):
    __slots__ = ()


class Table(dict):
    pass


class Row(list):
    pass


class Line(deque):
    pass


class Pair(tuple):
    pass


class Array(np.ndarray):
    pass


class Slotted:
    __slots__ = ("factor",)


class Both(Slotted):
    """An attribute in a slot beside those in its dictionary."""

    def __init__(self):
        self.factor, self.other = 2.0, 1.0


def with_attribute(container):
    container.factor = 2.0
    return container


def hidden():
    return [nn.Linear(8, 8)]


class Reads(nn.Module):
    """Computes with `value`, as `use` reads it."""

    def __init__(self, value, use):
        super().__init__()
        self.layer, self.value, self.use = nn.Linear(8, 8), value, use

    def forward(self, x):
        return (self.layer(x) * self.use(self, self.value)).square().mean()


def replaced(new):
    return lambda model: setattr(model, "value", new)


def of_modules(model, modules):
    return functools.reduce(lambda h, layer: layer(h), modules, torch.ones(8))


VALUES = {  # value at planning, how the forward reads it, what the loop does
    "float, derived": (lambda: Number(2.0), lambda m, v: v, replaced(Number(3.0))),
    "int, derived": (lambda: Whole(2), lambda m, v: v, replaced(Whole(3))),
    "str, derived": (lambda: Text("22"), lambda m, v: float(v), replaced(Text("23"))),
    "array, derived": (lambda: np.ones(8).view(Array), lambda m, v: float(v[0]), lambda m: m.value.__setitem__(0, 5.0)),
    "array of the standard library": (
        lambda: array.array("i", [1, 2]),
        lambda m, v: v.itemsize * v[0],
        replaced(array.array("h", [1, 0, 2, 0])),
    ),
    "getter of an item": (lambda: operator.itemgetter(0), lambda m, v: v((2.0, 3.0)), replaced(operator.itemgetter(1))),
    "getter of an attribute": (
        lambda: operator.attrgetter("layer.in_features"),
        lambda m, v: v(m),
        replaced(operator.attrgetter("training")),
    ),
    "attribute of a dict": (lambda: with_attribute(Table()), lambda m, v: v.factor, lambda m: setattr(m.value, "factor", 3.0)),
    "attribute of a list": (lambda: with_attribute(Row()), lambda m, v: v.factor, lambda m: setattr(m.value, "factor", 3.0)),
    "attribute of a deque": (lambda: with_attribute(Line()), lambda m, v: v.factor, lambda m: setattr(m.value, "factor", 3.0)),
    "attribute of a tuple": (lambda: with_attribute(Pair()), lambda m, v: v.factor, lambda m: setattr(m.value, "factor", 3.0)),
    "item of a derived dict": (lambda: Table(a=2.0), lambda m, v: v["a"], lambda m: m.value.update(a=3.0)),
    "order of a dict": (
        lambda: OrderedDict(a=2.0, b=3.0),
        lambda m, v: next(iter(v.values())),
        lambda m: m.value.move_to_end("a"),
    ),
    "slot beside attributes": (lambda: Both(), lambda m, v: v.factor, lambda m: setattr(m.value, "factor", 3.0)),
    "attribute beside a slot": (lambda: Both(), lambda m, v: v.factor * v.other, lambda m: setattr(m.value, "other", 3.0)),
    "slot in a list": (lambda: [Both()], lambda m, v: v[0].factor, lambda m: setattr(m.value[0], "factor", 3.0)),
    "a dict behind a proxy": (
        lambda: types.MappingProxyType(PROXIED),
        lambda m, v: v["factor"],
        lambda m: PROXIED.update(factor=3.0),
    ),
    "a weight of a hidden module": (
        hidden,
        lambda m, v: v[0](torch.ones(8)),
        lambda m: setattr(m.value[0], "weight", nn.Parameter(torch.ones(8, 8))),
    ),
    "a submodule appended to none": (
        nn.ModuleList,
        of_modules,
        lambda m: m.value.append(nn.Linear(8, 8)),
    ),
    "a submodule put into none": (
        nn.ModuleDict,
        lambda m, v: of_modules(m, v.values()),
        lambda m: m.value.update({"a": nn.Tanh()}),
    ),
    "a parameter appended to none": (
        nn.ParameterList,
        lambda m, v: sum(v, torch.ones(8)),
        lambda m: m.value.append(nn.Parameter(torch.ones(8))),
    ),
    "a parameter that was absent": (
        lambda: None,
        lambda m, v: m.scale if hasattr(m, "scale") else 1.0,
        lambda m: setattr(m, "scale", nn.Parameter(torch.full((8,), 2.0))),
    ),
    "a buffer that was absent": (
        lambda: None,
        lambda m, v: getattr(m, "scale", 1.0),
        lambda m: m.register_buffer("scale", torch.full((8,), 2.0)),
    ),
    "a submodule that was absent": (
        lambda: None,
        lambda m, v: m.extra(torch.ones(8)) if hasattr(m, "extra") else 1.0,
        lambda m: m.add_module("extra", nn.Linear(8, 8)),
    ),
    "an attribute that was absent": (lambda: None, lambda m, v: getattr(m, "scale", 1.0), lambda m: setattr(m, "scale", 2.0)),
}
PROXIED = {"factor": 2.0}
FOLLOWED = ("a weight of a hidden module",)
"""Read anew at every call, as the model's own weights are."""


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", VALUES)
def test_a_change_is_noticed(name):
    make, use, change = VALUES[name]
    PROXIED["factor"] = 2.0
    torch.manual_seed(0)
    twin = Reads(make(), use)
    torch.manual_seed(0)
    model, x = Reads(make(), use), torch.randn(3, 8)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False, audit=False)
    assert_same(trajectory(twin, (x,), {}), trajectory(planned, (x,), {}))
    assert planned.num_unplanned_calls == 0
    change(model)
    expected = model(x)
    if name in FOLLOWED:
        assert torch.equal(planned(x), expected) and planned.num_unplanned_calls == 0
        return
    with pytest.warns(MismatchWarning):
        found = planned(x)
    assert torch.equal(found, expected) and planned.num_unplanned_calls == 1


class Holder:
    def __init__(self, held):
        self.held = held


HOLDERS = {
    "list": (lambda layer: [layer], lambda v: v[0]),
    "tuple in a dict": (lambda layer: {"a": (layer,)}, lambda v: v["a"][0]),
    "deque": (lambda layer: deque([layer]), lambda v: v[0]),
    "object": (Holder, lambda v: v.held),
    "object in a list": (lambda layer: [Holder(layer)], lambda v: v[0].held),
    "closure": (lambda layer: lambda: layer, lambda v: v()),
    "partial": (lambda layer: functools.partial(lambda kept: kept, layer), lambda v: v()),
    "module in a module": (lambda layer: [nn.Sequential(nn.Tanh(), layer)], lambda v: v[0][1]),
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_module_that_is_not_among_the_models_own_stays_as_it_is_and_trains(name, grad):
    hold, layer_of = HOLDERS[name]
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8).requires_grad_(grad), torch.randn(3, 8)
    model = Reads(hold(layer), lambda m, v: layer_of(v)(torch.ones(8)))
    held = dict(layer._parameters)
    assert layer_of(model.value) is layer
    try:
        planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    except PlannerError:
        planned = None
    assert layer._parameters.keys() == held.keys() and all(layer._parameters[n] is p for n, p in held.items())
    results = []
    for module in (model, planned or model):
        model.zero_grad()
        layer.zero_grad()
        loss = module(x)
        loss.backward()
        results.append([loss, *(p.grad for p in (*model.parameters(), *layer.parameters()) if p.requires_grad)])
    assert_same(*results)


def test_a_large_container_that_is_read_for_each_of_its_items_is_looked_through_a_few_times(monkeypatch):
    """A registry of names, as some libraries keep: read once per name, and growing meanwhile."""
    looked = []
    keep = reads.keep_deep
    monkeypatch.setattr(reads, "keep_deep", lambda *given: looked.append(given) or keep(*given))
    recorder = reads.ReadRecorder(nn.Module(), Preserved(), {}, str, lambda tensor: None)
    names: set[str] = set()
    for i in range(5000):
        names.add(str(i))
        recorder.see(names)
    assert 64 < len(looked) < 100


def _tower(height: int, leaf: object) -> list:
    """Each level holds the level below twice: as a tree, it has 2 ** height leaves."""
    held: list = [leaf]
    for _ in range(height):
        held = [held, held]
    return held


def _ring(*values: object) -> list:
    """A list that ends in itself."""
    held = list(values)
    held.append(held)
    return held


PAIRS = {
    "shared parts": (_tower(60, 1), _tower(60, 1), True),
    "a leaf of shared parts": (_tower(60, 1), _tower(60, 2), False),
    "its type": (_tower(60, 1), _tower(60, True), False),
    "its depth": (_tower(60, 1), _tower(59, 1), False),
    "rings": (_ring(1, 2), _ring(1, 2), True),
    "a value of a ring": (_ring(1, 2), _ring(1, 3), False),
    "the length of a ring": (_ring(1, 2), _ring(1, 2, 1), False),
    "sets": ({1, "a"}, {"a", 1}, True),
    "an item of a set": ({1, 2}, {1, 3}, False),
    "keys": ({"a": 1}, {"b": 1}, False),
    "order of a list": ([1, 2], [2, 1], False),
    "minus zero": ([0.0], [-0.0], False),
    "NaNs": ([float("nan")], [float("nan")], True),
}


@pytest.mark.parametrize(("one", "other", "expected"), PAIRS.values(), ids=PAIRS.keys())
def test_values_are_compared_pair_by_pair(one, other, expected):
    assert Fingerprints({}, lambda _, __: True).equal(one, other) is expected


def test_code_with_more_names_than_a_byte_counts():
    """Python then puts another instruction before an import's own."""
    lines = [f"    h = h * settings.scale_{i}" for i in range(300)]
    source = "\n".join(["def run(h):", *lines, "    from math import tau as turn", "    import os.path", "    return h * turn"])
    variables = {"settings": types.SimpleNamespace(**{f"scale_{i}": 1.0 for i in range(300)})}
    exec(source, variables)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return variables["run"](torch.tanh(self.linear(x))).sum()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(8, 4)
    expected = copy.deepcopy(model)(x)
    planned = plan(model, 1.0, (x,), progress=False)
    assert torch.equal(planned(x), expected) and planned.num_unplanned_calls == 0
    variables["settings"].scale_299 = 2.0
    with pytest.warns(MismatchWarning, match="scale_299"):
        assert torch.equal(planned(x), 2 * expected)
