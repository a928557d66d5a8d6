"""Objects among the arguments that hold tensors: a plan has no inputs for these, and never goes on with those of one call."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn

from planner import CaptureError, MismatchWarning, plan, plan_units
from tests.support.members import check, ids, member

BOX = "class Box:\n    def __init__(self, **held):\n        self.__dict__.update(held)"
SLOTS = "class Box:\n    __slots__ = ('v',)\n    def __init__(self, v):\n        self.v = v"


REFUSED, MISMATCH = frozenset({"refused"}), frozenset({"mismatch"})


def holding(name, value, forward="h = h * b.v", *, head=BOX, allowed=REFUSED, word="^CaptureError: pass the tensors of the "):
    given, more = f"(torch.randn(16, 8), {value})", {"allowed": allowed, "word": word, "planned_from": None}
    return member(name, forward, signature="self, x, b", given=given, head=head, **more)


TENSOR = "torch.randn(16, 1)"
OBJECTS = [
    holding("an object", f"Box(v={TENSOR})"),
    holding("a slot", f"Box({TENSOR})", head=SLOTS),
    holding("a namespace", f"types.SimpleNamespace(v={TENSOR})"),
    holding("an object in an object", f"Box(w=Box(v={TENSOR}))", "h = h * b.w.v"),
    holding("a list in an object", f"Box(v=[{TENSOR}])", "h = h * b.v[0]"),
    holding("an object in a list", f"[Box(v={TENSOR})]", "h = h * b[0].v"),
    holding("an object in a dictionary", f"{{'k': Box(v={TENSOR})}}", "h = h * b['k'].v"),
    holding("Python's wrapped dictionary", f"collections.UserDict(v={TENSOR})", "h = h * b['v']"),
    holding("a class derived from it", f"Box(v={TENSOR})", "h = h * b['v']", head="class Box(collections.UserDict):\n    pass"),
    holding("a class derived from dict", f"Box(v={TENSOR})", "h = h * b['v']", head="class Box(dict):\n    pass"),
    holding("a class derived from list", f"Box([{TENSOR}])", "h = h * b[0]", head="class Box(list):\n    pass"),
    holding("a set", f"{{{TENSOR}}}", "h = h * next(iter(b))"),
    holding("a closure", f"(lambda v: lambda h: h * v)({TENSOR})", "h = b(h)"),
    holding("a default", f"eval('lambda h, v=v: h * v', {{'v': {TENSOR}}})", "h = b(h)"),
    holding("a partial function", f"functools.partial(torch.mul, {TENSOR})", "h = b(h)"),
    holding(
        "a method", f"Box(v={TENSOR}).scale", "h = b(h)", head=BOX + "\n    def scale(self, h):\n        return h * self.v"
    ),
    holding("a property", f"Box(w={TENSOR})", head=BOX + "\n    @property\n    def v(self):\n        return self.w * 2"),
    holding("a distribution", f"torch.distributions.Normal({TENSOR}, torch.ones(16, 1))", "h = h * b.loc + b.log_prob(h)"),
    holding("a module", "torch.nn.Linear(8, 8)", "h = h + b(h)", word="requires grad and is found neither"),
    holding(
        "one that requires grad", "Box(v=torch.randn(16, 1, requires_grad=True))", word="requires grad and is found neither"
    ),
    holding(
        "one that an earlier step computed",
        "Box(v=torch.randn(16, 1, requires_grad=True).tanh())",
        word="requires grad and is found neither",
    ),
    holding("only its number", f"Box(v={TENSOR})", "h = h * b.v.sum().item()"),
    holding("only its sign", f"Box(v={TENSOR})", "h = h if b.v.sum() > 0 else -h"),
    holding("only its shape", f"Box(v={TENSOR})", "h = h * b.v.shape[0]", allowed=MISMATCH, word="another object"),
    holding("an iterator", f"itertools.repeat({TENSOR})", "h = h * next(b)", word="not the iterator"),
    holding("an iterator of numbers", "iter([1.0, 2.0, 3.0, 4.0])", "h = h * next(b)", word="not the iterator"),
    holding("a generator", "(i for i in range(99))", "h = h * next(b)", word="not the iterator"),
    holding("an iterator in an object", "Box(v=itertools.count(1))", "h = h * next(b.v)", word="not the iterator"),
    holding("a view of it", f"Box(v={TENSOR}.T)", "h = h * b.v.T"),
    holding("written in place", f"Box(v={TENSOR})", "b.v.mul_(2)\nh = h * b.v"),
    holding("set", f"Box(v={TENSOR})", "b.v = h * b.v\nh = b.v", word="writes into an object"),
    holding("one of the input's", "Box(v=None)", "b.v = x\nh = h + b.v.sum()", word="writes into an object"),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", OBJECTS, ids=ids(OBJECTS))
def test_tensors_in_objects_are_those_of_the_call(of):
    check(of)


class Box:
    def __init__(self, v):
        self.v = v


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x, box):
        return x + self.down(torch.tanh(self.up(x * box.v)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, scale):
        box = Box(x.sin())
        for block in self.blocks:
            x = block(x, box)
            box = Box(x.cos() * scale)
        return x.sum()


def trained(model, make=Box, steps=3):
    found = []
    torch.manual_seed(1)
    for _ in range(steps):
        model.zero_grad()
        loss = model(torch.randn(64, 8), make(torch.randn(64, 1)))
        loss.sum().backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    return found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_objects_that_the_forward_makes_for_its_submodules():
    """Captured with the rest; blocks that are planned on their own run as they are."""
    model = Blocks()
    plain = trained(copy.deepcopy(model), make=lambda v: v)
    x, scale = torch.randn(64, 8), torch.randn(64, 1)
    planned = plan(model, 0.8, (x, scale), progress=False)
    assert same(plain, trained(planned, make=lambda v: v))
    assert planned.num_planned_calls == 3
    in_units = plan_units(model, "1MiB", (x, scale), progress=False)
    assert in_units.planned
    assert {f"blocks.{i}" for i in range(4)}.isdisjoint(in_units.planned)  # but their layers are
    assert same(plain, trained(model, make=lambda v: v))


def test_the_object_and_the_cure_are_named():
    with pytest.raises(CaptureError, match=r"^pass the tensors of the Box \(argument leaf 1\) as arguments, or in tuples"):
        plan(Block(), 1.0, (torch.randn(4, 8), Box(torch.randn(4, 8))), progress=False)


class Shaped(Block):
    """Reads the form of the object's tensor, and computes with no value of it."""

    def forward(self, x, box):
        return x + self.down(torch.tanh(self.up(x * box.v.shape[1])))


def test_another_tensor_is_another_call_in_copies_and_loaded_plans_too():
    model, box = Shaped(), types.SimpleNamespace(v=torch.randn(64, 1))
    x = torch.randn(64, 8)
    planned = plan(model, 1.0, (x, box), progress=False)
    assert torch.equal(planned(x, box), model(x, box))
    assert planned.num_planned_calls == 1
    for each in (planned, copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        other, before = types.SimpleNamespace(v=torch.randn(64, 1)), each.num_planned_calls
        with pytest.warns(
            MismatchWarning, match=r"argument leaf 1\.v is another object .*Pass tensors in tuples, lists and dicts"
        ):
            assert torch.equal(each(x, other), model(x, other))
        assert each.num_planned_calls == before
