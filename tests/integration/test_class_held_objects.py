"""What objects hold by their classes, objects of libraries, lists of weights, and writes and gradients beside the forward."""

import pytest
import torch
from torch import nn

from planner import BackwardError, MismatchWarning, plan
from tests.support.members import check, ids, member
from tests.support.source import Step

MISMATCH, REFUSED = frozenset({"mismatch"}), frozenset({"refused"})
HEAD = """
class Base:
    low = 1.0
class C(Base):
    s = 2.0
    d = {'k': 2.0}
    def f(self, h): return h * 2
    def g(self, h): return h * self.s
class Inner:
    def __init__(self): self.s = 2.0
    def __call__(self, g): return g * self.s
class Outer:
    def __init__(self): self.inner = Inner()
    def __call__(self, g): return self.inner(g)
S = 2.0
def scaled(g): return g * S
TABLE = {'f': scaled}
@dataclasses.dataclass
class D:
    s: float = 2.0
class Proxy:
    def __init__(self, inner): self._inner = inner
    __class__ = property(lambda self: type(self._inner))
    def __getattr__(self, name): return getattr(self._inner, name)
class Holds:
    class In: s = 2.0
    @staticmethod
    def f(h): return h * 2
class E(enum.Enum): A = 1
class N(enum.IntEnum): A = 1
class Text(str, enum.Enum): A = "a"
class V(enum.Enum): A = {"k": 2.0}
N.A.factor = Text.A.factor = E.A.factor = E.A._low = 2.0
E.A.d = {"k": 2.0}
class Frozen(frozenset): k = 2.0
class Word(str): pass
def other(self, h): return h * 3
def taken(g): b['k'] = g
"""


def holding(name, value, use, change, word, **more):
    """A model that holds an object in `self.o`, which the loop changes at the third step."""
    steps = (Step(), Step(), Step(before=change), Step())
    return member(
        name, use, init=f"self.o = {value}", head=HEAD, steps=steps, allowed=MISMATCH, word=word, planned_from=None, **more
    )


SGD = "torch.optim.SGD([torch.zeros(1)], lr=2.0)"
SETTINGS = [
    holding("an attribute of the class", "C()", "h = h * self.o.s", "C.s = 3.0", r"o\.s is 3\.0, planned for 2\.0"),
    holding("behind a proxy that answers for its class", "Proxy(C())", "h = h * self.o.s", "C.s = 3.0", r"o.* is 3\.0"),
    holding("of a base class", "C()", "h = h * self.o.low", "Base.low = 3.0", r"o\.low is 3\.0"),
    holding("a dictionary of the class", "C()", "h = h * self.o.d['k']", "C.d['k'] = 3.0", r"o\.d\['k'\] is 3\.0"),
    holding("read by a method", "C()", "h = self.o.g(h)", "C.s = 3.0", r"o\.s is 3\.0"),
    holding("a method", "C()", "h = self.o.f(h)", "C.f = other", r"o\.f is other"),
    holding("of an object in a list", "[C()]", "h = h * self.o[0].s", "C.s = 3.0", r"o\[0\]\.s is 3\.0"),
    holding("hidden by an own attribute", "C()", "h = h * self.o.s", "part.o.s = 3.0", r"o\.s is 3\.0|o is|items"),
    holding("hidden, but asked of the class", "D()", "h = h * type(self.o).s", "D.s = 3.0", r"o\.s is 3\.0"),
    holding("of a class in a class that is held", "Holds", "h = h * self.o.In.s", "Holds.In.s = 3.0", r"In\.s is 3\.0"),
    holding(
        "a method of a class that is held",
        "Holds",
        "h = self.o.f(h)",
        "Holds.f = staticmethod(lambda h: h * 3)",
        r"o\.f(\.__wrapped__)? is",
    ),
    holding("of a member of an enumeration", "E.A", "h = h * self.o.factor", "E.A.factor = 3.0", "o is|factor"),
    holding("of a number of an enumeration", "N.A", "h = h * self.o.factor", "N.A.factor = 3.0", "o is|factor"),
    holding("of a text of an enumeration", "Text.A", "h = h * self.o.factor", "Text.A.factor = 3.0", "o is|factor"),
    holding("private, of an enumeration", "E.A", "h = h * self.o._low", "E.A._low = 3.0", "o is|_low"),
    holding("a value of an enumeration", "V.A", "h = h * self.o.value['k']", "V.A.value['k'] = 3.0", "o is|_value_"),
    holding("in what a member of an enumeration holds", "E.A", "h = h * self.o.d['k']", "E.A.d['k'] = 3.0", "o is|d"),
    holding("of a derived set's class", "Frozen([1])", "h = h * self.o.k", "Frozen.k = 3.0", "o is|o.k is"),
    holding(
        "a gradient scaler",
        "torch.amp.GradScaler('cpu', 2.0)",
        "h = h * self.o._init_scale",
        "part.o._init_scale = 3.0",
        "is 3",
    ),
    holding("a hook's", "C()", "h.register_hook(lambda g: g * self.o.s)", "C.s = 3.0", r"o\.s is 3\.0"),
    holding(
        "an optimizer", SGD, "h = h * self.o.param_groups[0]['lr']", "part.o.param_groups[0]['lr'] = 3.0", r"\['lr'\] is 3\.0"
    ),
    holding(
        "a scheduler",
        f"torch.optim.lr_scheduler.StepLR({SGD}, 1)",
        "h = h * self.o.last_epoch",
        "part.o.last_epoch = 3",
        "last_epoch is 3",
    ),
    holding(
        "Python's wrapped dictionary", "collections.UserDict(s=2.0)", "h = h * self.o['s']", "part.o['s'] = 3.0", r"'s'\] is 3"
    ),
    holding("Python's wrapped list", "collections.UserList([2.0])", "h = h * self.o[0]", "part.o[0] = 3.0", r"\[0\] is 3\.0"),
    holding(
        "a method of a dictionary", "{'s': 2.0}.get", "h = h * self.o('s')", "part.o.__self__['s'] = 3.0", r"\['s'\] is 3\.0"
    ),
    holding("a derived set", "Frozen([1])", "h = h * getattr(self.o, 's', 2.0)", "part.o.s = 3.0", "o is"),
    holding("a derived text", "Word('a')", "h = h * getattr(self.o, 's', 2.0)", "part.o.s = 3.0", "o is"),
    holding("a callable in a callable hook", "Outer()", "h.register_hook(self.o)", "part.o.inner.s = 3.0", r"inner\.s is 3\.0"),
    holding("a hook by a table", "0", "h.register_hook(lambda g: TABLE['f'](g))", "global S\nS = 3.0", "S is 3"),
    holding(
        "new buffers", "0", "h = h + sum(b.sum() for b in self.buffers())", "part.register_buffer('z', torch.ones(2))", "added"
    ),
    holding(
        "new parameters",
        "0",
        "h = h + sum(p.sum() for p in self.parameters())",
        "part.register_parameter('z', nn.Parameter(torch.ones(2)))",
        "added",
    ),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", SETTINGS, ids=ids(SETTINGS))
def test_a_change_is_noticed(of):
    check(of, audit=False)


def given(name, value, use, word, **more):
    arguments = f"(torch.randn(16, 8), {value})"
    return member(
        name, use, signature="self, x, b", given=arguments, head=HEAD, allowed=REFUSED, word=word, planned_from=None, **more
    )


BESIDE = [
    given("a hook that writes into an argument", "{}", "h.register_hook(lambda g: b.update(g=g))", "the call's arguments"),
    given("a hook that appends to one", "[]", "h.register_hook(lambda g: b.append(g) or g)", "the call's arguments"),
    given("a gradient that is kept", "1", "h.retain_grad()\nself.h = h", "retain_grad", init="self.h = None"),
    given(
        "the environment by any name in a hook",
        "1",
        "h.register_hook(lambda g: g * float(getattr(os, 'environ').get('S', 2) or os.environ['S']))",
        "environment variables",
    ),
    given(
        "the environment in a hook",
        "1",
        "h.register_hook(lambda g: g * float(os.environ.get('S', 2)))",
        "environment variables",
    ),
    given("a wrapped dictionary", "collections.UserDict(n=1)", "b['n'] += 1", "writes into an object"),
    given("a class counts", "C()", "C.s += 1\nh = h * b.s", "C.s|writes into an object"),
]


@pytest.mark.parametrize("of", BESIDE, ids=ids(BESIDE))
def test_what_a_plan_would_leave_out_is_refused(of):
    check(of)


def test_an_object_of_the_call_that_the_model_keeps_is_the_callers():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.last = nn.Linear(8, 8), None

        def forward(self, x, box):
            self.last = box
            return torch.tanh(self.up(x))

    model, x = Keeps(), torch.randn(4, 8)
    make = lambda: Box(1)
    planned = plan(model, 1.0, (x, make()), progress=False)
    for _ in range(3):
        box = make()
        planned(x, box)
        assert model.last is box
    assert planned.num_planned_calls == 3


class Box:
    def __init__(self, v):
        self.v = v


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, q, k):
        h = torch.tanh(self.up(x))
        return h if q is k else h * 2


@pytest.mark.parametrize("make", [lambda: [1, 2], lambda: {"a": 1}, lambda: Box(1)], ids=["lists", "dictionaries", "objects"])
def test_which_objects_of_a_call_are_the_same_one_counts_where_the_forward_asks(make):
    model, x, one = Asks(), torch.randn(4, 8), make()
    with pytest.raises(Exception, match="stands in two places"):
        plan(model, 1.0, (x, one, one), progress=False)
    planned = plan(model, 1.0, (x, make(), make()), progress=False)
    assert torch.equal(planned(x, make(), make()), model(x, make(), make()))
    assert planned.num_planned_calls == 1
    with pytest.warns(UserWarning, match="stands in two places"):
        assert torch.equal(planned(x, one, one), model(x, one, one))
    assert planned.num_planned_calls == 1


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, scale=1.0, **more):
        h = torch.tanh(self.up(x)) * scale
        for i, value in enumerate(more.values()):
            h = h + i * value
        return h


def test_the_order_of_keywords_counts_where_the_forward_sees_it():
    model, x = Ordered(), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), {"scale": 2.0, "u": x * 2, "v": x * 3}, progress=False)
    same = {"u": x * 2, "scale": 2.0, "v": x * 3}
    assert torch.equal(planned(x, **same), model(x, **same))
    assert planned.num_planned_calls == 1
    other = {"scale": 2.0, "v": x * 3, "u": x * 2}
    with pytest.warns(UserWarning, match="another order"):
        assert torch.equal(planned(x, **other), model(x, **other))
    assert planned.num_planned_calls == 1


PARTS = {"rows": lambda out: out[:2], "transposed": lambda out: out.t(), "reshaped": lambda out: out.view(-1)}


class Views(nn.Module):
    """Returns an output and a view of it, or leaves the view for the loop."""

    def __init__(self, part, leaves):
        super().__init__()
        self.up, self.down, self.left = nn.Linear(8, 16), nn.Linear(16, 8), None
        self.part, self.leaves = part, leaves

    def forward(self, x):
        out = self.down(torch.tanh(self.up(x)))
        if self.leaves:
            self.left = PARTS[self.part](out)
            return out, None
        return out, PARTS[self.part](out)


def loss_after_a_write(module, model, x, *, to_view, recorded):
    """A loss of one output after a write through the other. They end with this function, as in most loops."""
    out, view = module(x)
    one, other = (view if view is not None else model.left, out)[:: 1 if to_view else -1]
    with torch.set_grad_enabled(recorded):
        one.mul_(2)
    return (other * 3).sum()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("leaves", [False, True], ids=["returned", "left on the model"])
@pytest.mark.parametrize("to_view", [True, False], ids=["view", "base"])
def test_recorded_writes_through_one_of_two_outputs_that_share_memory_are_refused(part, leaves, to_view):
    torch.manual_seed(0)
    model, x = Views(part, leaves), torch.randn(4, 8)
    planned = plan(model, "1MiB", (x,), progress=False)
    loss_after_a_write(model, model, x, to_view=to_view, recorded=True).backward()
    with pytest.raises((BackwardError, RuntimeError), match=r"in ?place"):
        loss_after_a_write(planned, model, x, to_view=to_view, recorded=True).backward()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("leaves", [False, True], ids=["returned", "left on the model"])
@pytest.mark.parametrize("to_view", [True, False], ids=["view", "base"])
def test_other_writes_into_outputs_that_share_memory_are_exact_or_refused(part, leaves, to_view):
    torch.manual_seed(0)
    model, x = Views(part, leaves), torch.randn(4, 8)
    planned, found = plan(model, "1MiB", (x,), progress=False), []
    for module in (model, planned):
        model.zero_grad()
        loss = loss_after_a_write(module, model, x, to_view=to_view, recorded=False)
        try:
            loss.backward()
        except BackwardError:  # the output that was written is gone: nobody knows whether autograd recorded it
            assert module is planned
            return
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_a_recorded_write_outputs_that_are_there_train_as_in_eager():
    torch.manual_seed(0)
    model, x, found = Views("rows", leaves=False), torch.randn(4, 8), []
    planned = plan(model, "1MiB", (x,), progress=False)
    for module in (model, planned):
        model.zero_grad()
        out, view = module(x)
        with torch.no_grad():
            view.mul_(2)
        (out.square().sum() + view.square().sum()).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert planned.num_planned_calls == 1


def test_a_class_that_the_models_class_holds() -> None:
    """It has no code that runs, and the model reads it by its own class."""

    class Scale:
        factor = 2.0

    class Net(nn.Module):
        scale = Scale

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.first(x) * type(self).scale().factor).sum()

    model, x = Net(), torch.randn(4, 8)
    planned = plan(model, 1.0, (x,), progress=False)
    assert planned(x).item() == model(x).item()
    Scale.factor = 3.0
    with pytest.warns(MismatchWarning, match=r"factor is 3\.0"):
        assert planned(x).item() == model(x).item()
