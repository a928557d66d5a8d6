"""Lists and dictionaries that a forward returns and keeps: what the caller writes into them is there at the next call."""

import pytest
import torch
from torch import nn

from planner import ExportError, export_source, plan
from tests.support.members import ANY, GUARDED, REFUSABLE, check, member, sampled
from tests.support.source import Step

HEAD = """
TABLE = {'k': 1.0}
class Plain:
    def __init__(self): self.l = []
@functools.lru_cache
def cached(): return {'k': 1.0}
def holder(kept):
    return lambda: kept
class Derived(collections.OrderedDict): pass
@dataclasses.dataclass
class Data:
    t: object
    l: list
class Pair(collections.namedtuple('Pair', 't l')): pass
register = torch.utils._pytree.register_pytree_node
register(Derived, lambda d: (list(d.values()), list(d)), lambda items, keys: Derived(zip(keys, items)))
register(Data, lambda d: ([d.t, d.l], None), lambda items, _: Data(*items))
"""
INIT = """
self.l, self.d, self.queue, self.o = [], {'k': 1.0}, collections.deque([1.0]), Plain()
self.counts, self.inner, self.held = collections.defaultdict(float), {'l': [1.0]}, holder([])
self.last, self.history, self.derived, self.data = None, [], Derived(k=1.0), Data(1.0, [1.0])
"""
STEPS = tuple(Step("written_output") for _ in range(3))
OUT = "self.c(torch.tanh(self.b(torch.sigmoid(h) * 2)))"
READ = {
    "list": ("len(self.l)", "self.l"),
    "dictionary": ("self.d['k']", "self.d"),
    "default dictionary": ("len(self.counts)", "self.counts"),
    "deque": ("len(self.queue)", "self.queue"),
    "inner list": ("len(self.inner['l'])", "self.inner['l']"),
    "of an object": ("len(self.o.l)", "self.o.l"),
    "global variable": ("TABLE['k']", "TABLE"),
    "closure": ("len(self.held())", "self.held()"),
    "cache": ("cached()['k']", "cached()"),
    "twice": ("len(self.l)", "{'a': self.l, 'b': (self.l, self.d)}"),
    "not read": ("0", "self.l"),
    "derived dictionary": ("self.derived['k']", "self.derived"),
    "registered object": ("len(self.data.l)", "self.data"),
    "list of a registered object": ("len(self.data.l)", "self.data.l"),
    "list in a new registered object": ("len(self.l)", "Data(2.0, self.l)"),
    "list in a new derived dictionary": ("len(self.l)", "Derived(l=self.l)"),
    "list in a named tuple": ("len(self.l)", "Pair(h.mean(), self.l)"),
}
LEFT = {
    "new list": ("self.last = [h.mean()]", "self.last"),
    "new dictionary": ("self.last = {'m': h.mean().detach()}", "self.last"),
    "list in a new dictionary": ("self.last = {'m': [h.mean()]}", "self.last['m']"),
    "local name": ("made = [h.mean()]\nself.last = made", "made"),
    "new derived dictionary": ("self.last = Derived(m=h.mean())", "self.last"),
    "new registered object": ("self.last = Data(h.mean(), [1.0])", "self.last"),
    "put into another": ("made = {'m': h.mean()}\nself.d['made'] = made", "made"),
}


def read():
    for name, (value, returned) in READ.items():
        allowed, out = ANY if name == "cache" else GUARDED, f"({OUT}, {returned})"
        fields = {"head": HEAD, "init": INIT, "out": out, "steps": STEPS, "planned_from": None}
        yield member(name, f"h = h * (1 + {value})", allowed=allowed, **fields)


def left():
    for name, (text, returned) in LEFT.items():
        out = f"({OUT}, {returned})"
        yield member(name, text, head=HEAD, init=INIT, out=out, steps=STEPS, allowed=REFUSABLE)


@pytest.mark.parametrize("of", sampled([*read()], every=2))
def test_what_the_caller_writes_into_state_that_is_returned(of):
    check(of)


@pytest.mark.parametrize("of", sampled([*left()], every=1))
def test_a_new_container_is_the_same_one_in_the_output_and_in_state(of):
    assert check(of).verdict == "same"


TWICE = {
    "inside of a list": "self.last = [h.mean()]\nself.history = [self.last]",
    "inside of a tuple": "self.last = [h.mean()]\nself.history = (self.last, 1)",
    "the list itself": "self.last = self.history = [h.mean()]",
    "twice in one": "self.last = [h.mean()]\nself.history = [self.last, self.last]",
    "a dictionary": "self.last = {'m': h.mean()}\nself.history = [[self.last]]",
    "inside of one that is kept": "self.last = [h.mean()]\nself.kept['now'] = self.last\nself.history = [self.last]",
    "as an item of the other": "self.history = [[h.mean()], 2]\nself.last = self.history[0]",
}


@pytest.mark.parametrize("name", TWICE)
def test_a_new_container_that_is_left_twice_is_one(name):
    grow = "part.last.update({len(part.last): 1.0})" if "dict" in name else "part.last.append(1.0)"
    of = member(
        name,
        TWICE[name],
        head=HEAD,
        init=f"{INIT}\nself.kept = {{}}",
        steps=(*[Step(before=f"part.last and {grow}")] * 3,),
        allowed=frozenset({"same"}),
    )
    check(of)


def test_a_container_that_is_left_twice_where_one_cannot_be_built_is_refused():
    of = member(
        "in a function",
        "last = self.last = [h.mean()]\nself.history = lambda: last",
        head=HEAD,
        init=INIT,
        steps=(Step(), Step()),
        allowed=frozenset({"refused"}),
    )
    check(of)


class Keeps(nn.Module):
    """Returns a list that it keeps, or one that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(8, 8), [1.0]

    def forward(self, x, given=None):
        return self.linear(x).sum() * 2, self.kept if given is None else given


@pytest.mark.parametrize(("given", "place"), [((), "kept"), (([1.0],), r"args\[1\]")])
def test_an_exported_file_has_no_such_container(given, place, tmp_path):
    planned = plan(Keeps(), 1.0, (torch.randn(16, 8), *given), costs="estimate", progress=False)
    with pytest.raises(ExportError, match=f"list or dictionary at {place} itself"):
        export_source(planned, tmp_path / "step.py")


class LeavesTwice(nn.Module):
    """Leaves one new container at two places."""

    def __init__(self, leave):
        super().__init__()
        self.linear, self.leave, self.kept, self.one, self.other = nn.Linear(8, 8), leave, {}, None, None

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        self.leave(self, h)
        return h.sum()


class Plain:
    pass


def in_a_list(module, h):
    module.one = [h.mean()]
    module.other = [0, module.one]


def in_a_tuple(module, h):
    module.one = {"m": h.mean()}
    module.other = (0, module.one)


def as_an_item_of_the_first(module, h):
    module.other = [0, [h.mean()]]
    module.one = module.other[1]


def in_one_that_is_kept(module, h):
    module.one = module.kept["now"] = [h.mean()]
    module.other = (0, module.kept["now"])


def an_object(module, h):
    module.one = Plain()
    module.one.m = h.mean()
    module.other = [0, module.one]


def once(leave):
    """The first call alone leaves it."""

    def run(module, h):
        if module.one is None:
            leave(module, h.detach())

    return run


@pytest.mark.parametrize("leave", [in_a_list, in_a_tuple, as_an_item_of_the_first, in_one_that_is_kept])
def test_a_first_call_leaves_one_container_at_both_places(leave):
    x, model = torch.randn(4, 8), LeavesTwice(once(leave))
    planned = plan(model, "1MiB", (x,), progress=False)
    for _ in range(2):
        planned(x).backward()
        model.zero_grad()
        assert model.one is model.other[1]
    assert planned.num_unplanned_calls == 0


@pytest.mark.parametrize("leave", [in_a_list, in_a_tuple, as_an_item_of_the_first, in_one_that_is_kept, an_object])
def test_a_planned_call_leaves_one_container_at_both_places(leave):
    x, model = torch.randn(4, 8), LeavesTwice(leave)
    planned = plan(model, 1.0, (x,), progress=False)
    seen = []
    for _ in range(2):
        planned(x).backward()
        assert model.one is model.other[1]
        seen.append(model.one)
    assert planned.num_unplanned_calls == 0 and seen[0] is not seen[1]
    assert "now" not in model.kept or model.kept["now"] is model.one
