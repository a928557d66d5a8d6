"""Objects that hold what the forward computes, left in Python state: built again at each call, or refused."""

import itertools

import pytest

from tests.support.members import ANY, GUARDED, SAME, check, member, sampled
from tests.support.source import Step

HEAD = """
class Plain:
    def __init__(self, t): self.t = t
class Slots:
    __slots__ = ('t',)
    def __init__(self, t): self.t = t
class Both(Slots):
    def __init__(self, t): self.t, self.u = t, t
@dataclasses.dataclass(slots=True)
class Data:
    t: object = None
class Derived(list): pass
def later(t):
    yield t
"""
BUILT = {
    "an object": "Plain(h.detach())",
    "slots": "Slots(h.detach())",
    "slots and attributes": "Both(h.detach())",
    "slots of a dataclass": "Data(h.detach())",
    "namespace": "types.SimpleNamespace(t=h.detach())",
    "derived list": "Derived([h.detach()])",
    "distribution": "torch.distributions.Normal(h.detach(), 1.0)",
    "distribution with a graph": "torch.distributions.Normal(h, 1.0)",
    "slots inside": "Plain({'k': [Slots(h.detach())]})",
}
HIDDEN = {
    "default of a function": "(lambda t=h.detach(): t)",
    "closure": "(lambda t: lambda: t)(h.detach())",
    "partial": "functools.partial(torch.add, h.detach())",
    "bound method": "h.detach().add",
    "iterator": "iter([h.detach()])",
    "iterator of a map": "map(torch.neg, [h.detach()])",
    "generator": "later(h.detach())",
    "named tuple of a new class": "collections.namedtuple('Pair', 't')(h.detach())",
    "view of a dictionary": "{'k': h.detach()}.values()",
    "items of a dictionary": "{'k': h.detach()}.items()",
    "method of an object": "Plain(h.detach()).__getattribute__",
    "exception": "ValueError(h.detach())",
    "default of a context variable": "contextvars.ContextVar('kept', default=h.detach())",
    "node of autograd's graph": "h.grad_fn",
    "optimizer": "torch.optim.SGD([nn.Parameter(h.detach())], 0.1)",
}
PLACES = {
    "attribute": "self.o = {}",
    "dict item": "self.d['k'] = {}",
    "new dict": "self.d = {{'k': {}}}",
    "list that is cut": "self.l.append({})\ndel self.l[:-1]",
    "list in a dict": "self.d.setdefault('l', []).append({})\ndel self.d['l'][:-1]",
}


def everywhere(values, allowed, **fields):
    for (name, value), (place, text) in itertools.product(values.items(), PLACES.items()):
        init = "self.o, self.d, self.l = None, {}, []"
        first = {"allowed": allowed | GUARDED, "planned_from": 1} if "setdefault" in text and allowed == SAME else {}
        options = {"allowed": allowed, **fields, **first}
        yield member(f"{name}, {place}", text.format(value), head=HEAD, init=init, **options)


@pytest.mark.parametrize("of", sampled([*everywhere(BUILT, SAME)], every=4))
def test_what_can_be_built_again_is_left_by_each_call(of):
    check(of)


@pytest.mark.parametrize("of", sampled([*everywhere(HIDDEN, ANY - SAME, planned_from=None)], every=4))
def test_tensors_in_what_cannot_are_those_of_the_call(of):
    check(of)


MADE = [
    ("list by setdefault", "self.d.setdefault('l', []).append(h.detach())\ndel self.d['l'][:-1]"),
    ("dict by setdefault", "self.d.setdefault('l', {})['k'] = h.detach()"),
    ("list if absent", "if not hasattr(self, 'k'):\n    self.k = []\nself.k.append(h.detach())\ndel self.k[:-1]"),
    ("list if None", "if self.o is None:\n    self.o = []\nself.o.append(h.detach())\ndel self.o[:-1]"),
    ("defaultdict", "self.f['l'].append(h.detach())\ndel self.f['l'][:-1]"),
    ("that grows", "self.d.setdefault('l', []).append(h.detach().mean())"),
]


@pytest.mark.parametrize(
    "before", ["", "part.d.clear()", "part.d = {}"], ids=["alone", "emptied by the loop", "replaced by the loop"]
)
@pytest.mark.parametrize(("name", "text"), MADE, ids=[name for name, _ in MADE])
def test_a_container_that_a_first_call_makes(name, text, before):
    init = "self.o, self.d, self.f = None, {}, collections.defaultdict(list)"
    check(member(name, text, init=init, steps=(Step(), Step(before=before), Step()), allowed=ANY, planned_from=None))
