"""Tensors that the forward leaves on modules for the training loop, and caches that it fills: there after each planned step."""

import pytest

from tests.support.itself import check_against_itself
from tests.support.members import ANY, GUARDED, REFUSABLE, check, ids, inside, member, sampled
from tests.support.source import Step

POINT = "@dataclasses.dataclass\nclass Left:\n    aux: object = None\n"
SQUARE = "h.square().mean()"


def left(name, place, init="", losses=None, value=SQUARE, **fields):
    """A differentiable value left in a place, which the loop adds to its loss."""
    read = place.replace("self", "part") if losses is None else losses
    return member(name, f"{place} = {value}", init=init, losses=f"[{read}]", **fields)


LEFT = [
    left("attribute", "self.aux", measured=True),
    left("attribute, None first", "self.aux", "self.aux = None"),
    left("attribute, a number first", "self.aux", "self.aux = 0.0"),
    left("attribute, a tensor first", "self.aux", "self.aux = torch.zeros(())"),
    left("dict item", "self.s['aux']", "self.s = {}", measured=True),
    left("dict of dicts", "self.s['a']['aux']", "self.s = {'a': {}}"),
    left("list item", "self.s[0]", "self.s = [None]"),
    left("child's attribute", "self.a.aux"),
    left("an activation", "self.kept", value="h", measured=True),
    left("a view of an activation", "self.kept", value="h[2:4].t()"),
    left("an activation written on", "self.kept", value="torch.relu_(h * 1.0)"),
    left("list replaced", "self.s", losses="*part.s", value="[h, h.square()]"),
    left("tuple", "self.s", losses="*part.s", value="(h, h.mean())"),
    left("dict replaced", "self.s", losses="*part.s.values()", value="{'a': h, 'b': h.mean()}"),
    left("nested", "self.s", losses="part.s['a'][0][1]", value="{'a': [(1, h)], 'n': 3}"),
    left("computed name", "vars(self)['a' + 'ux']", losses="part.aux"),
    left("a function of a weight", "self.aux", value="self.a.weight.square().sum()"),
    left("with dropout", "self.aux", value="F.dropout(h, 0.4).square().mean()"),
    left("a buffer", "self.aux", "self.register_buffer('aux', torch.zeros(()))", allowed=GUARDED, planned_from=1),
    member(
        "list appended, cleared by the forward",
        "self.s.clear()\nself.s.append(h)\nself.s.append(h.mean())",
        init="self.s = []",
        losses="part.s",
    ),
    member(
        "list appended, cleared by the loop",
        "self.s.append(h)\nself.s.append(h.mean())",
        init="self.s = []",
        losses="part.s",
        steps=(Step(), Step(before="part.s.clear()"), Step(before="part.s.clear()")),
    ),
    member(
        "list replaced, then appended",
        "self.s = []\nfor _ in range(2):\n    h = torch.tanh(h)\n    self.s.append(h)",
        losses="part.s",
    ),
    member("deque", "self.s.append(h)", init="self.s = collections.deque(maxlen=1)", losses="[*part.s]"),
    member("attention map", "q = h @ h.t()\nself.map = q.softmax(-1)\nh = self.map @ h", losses="[part.map[0]]", measured=True),
    member("two modules", "self.a.left = h\nself.b.left = h.mean()", losses="[part.a.left, part.b.left]"),
    member(
        "aux of two forwards in flight",
        "self.aux = h.square().mean()",
        losses="[part.aux]",
        steps=(Step("in_flight"), Step("in_flight_in_order"), Step("accumulate"), Step("twice")),
    ),
    member("nobody uses it", "self.aux = h.square().mean()"),
    member("detached", "self.seen = h.detach().mean(0)"),
    member("detached in a dict", "self.s['seen'] = h.detach().mean(0)", init="self.s = {}"),
    member("integers", "self.chosen = h.argmax(-1)"),
    member("bools", "self.active = h > 0"),
    member("a random mask", "self.mask = torch.rand_like(h) > 0.3\nh = h * self.mask"),
    member("the input", "self.x = x"),
    member("a weight", "self.w = self.b.weight", allowed=ANY, planned_from=None),
    member("the shape", "self.shape = tuple(x.shape)"),
    member("no grad", "with torch.no_grad():\n    self.norm = self.a.weight.norm()"),
    member("and returned as well", "self.h = h", out="(self.c(torch.tanh(self.b(h))), h)"),
    member("the output", "y = self.c(torch.tanh(self.b(h)))\nself.y = y", out="y"),
]

ELSEWHERE = [
    left("namespace", "self.s.aux", "self.s = types.SimpleNamespace(aux=None)"),
    left("dataclass", "self.s.aux", "self.s = Left()", head=POINT),
    left("slots", "self.s.aux", "self.s = S()", head="class S:\n    __slots__ = ('aux',)\n"),
    left("class attribute", "type(self).aux"),
    left("global dict", "G['aux']", losses="G['aux']", head="G = {}"),
    left("function attribute", "keep.aux", losses="keep.aux", head="def keep(): pass"),
    left("weight's attribute", "self.a.weight.aux"),
    member("global list", "G.clear()\nG.append(h)", head="G = []", losses="G"),
    member("global", "global AUX\nAUX = h.mean()", head="AUX = None", losses="[AUX]"),
    member(
        "closure",
        "collect(h)",
        head="def make():\n    s = []\n    def collect(h):\n        s[:] = [h]\n    return s, collect\nS, collect = make()",
        losses="S",
    ),
    member("context variable", "C.set(h.mean())", head="C = contextvars.ContextVar('C')", losses="[C.get()]"),
    member("list that grows", "self.s.append(h.detach().mean())", init="self.s = []"),
    member("list that grows, of the graph", "self.s.append(h)", init="self.s = []", losses="part.s[-1:]"),
    member("dict that grows", "self.s[len(self.s)] = h.detach().mean()", init="self.s = {}"),
    member("deque that turns", "self.s.append(h.detach().mean())", init="self.s = collections.deque(maxlen=2)"),
    member(
        "forward hook that collects",
        "pass",
        head="G = []",
        losses="G[-1:]",
        init="self.b.register_forward_hook(lambda m, a, o: G.__setitem__(slice(None), [o]))",
    ),
    member(
        "forward hook that collects on the module",
        "pass",
        losses="[part.b.seen]",
        init="self.b.register_forward_hook(lambda m, a, o: setattr(m, 'seen', o))",
    ),
    member(
        "pre-hook that collects",
        "pass",
        losses="[part.b.seen]",
        init="self.b.register_forward_pre_hook(lambda m, a: setattr(m, 'seen', a[0]))",
    ),
    member(
        "hook that appends",
        "pass",
        losses="part.s[-1:]",
        init="self.s = []\nself.b.register_forward_hook(lambda m, a, o: self.s.append(o))",
    ),
]
"""Places where a plan leaves it, or where it is refused by name."""

CACHES = [
    member("attribute", "if self.t is None:\n    self.t = torch.arange(8).float().cos()\nh = h * self.t", init="self.t = None"),
    member("absent attribute", "if not hasattr(self, 't'):\n    self.t = torch.arange(8).float().cos()\nh = h * self.t"),
    member("dict", "if 8 not in self.t:\n    self.t[8] = torch.arange(8).float().cos()\nh = h * self.t[8]", init="self.t = {}"),
    member("list", "if not self.t:\n    self.t.append(torch.arange(8).float().cos())\nh = h * self.t[0]", init="self.t = []"),
    member("setdefault", "h = h * self.t.setdefault(8, torch.arange(8).float().cos())", init="self.t = {}"),
    member(
        "buffer registered",
        "if self.t is None:\n    self.register_buffer('t', torch.arange(8).float().cos(), persistent=False)\nh = h * self.t",
        init="self.register_buffer('t', None, persistent=False)",
    ),
    member("new buffer", "if not hasattr(self, 't'):\n    self.register_buffer('t', torch.arange(8).float())\nh = h * self.t"),
    member(
        "grows with the input",
        "if self.t.shape[0] < x.shape[0]:\n    self.t = torch.arange(x.shape[0]).float()\nh = h * self.t[:x.shape[0], None]",
        init="self.t = torch.zeros(0)",
    ),
    member("number", "if self.n is None:\n    self.n = x.shape[1] ** -0.5\nh = h * self.n", init="self.n = None"),
    member(
        "flag",
        "if not self.ready:\n    self.ready = True\n    self.scale.fill_(2.0)\nh = h * self.scale",
        init="self.ready = False\nself.register_buffer('scale', torch.ones(8))",
    ),
    member(
        "tuple of tensors",
        "if self.t is None:\n    p = torch.arange(8).float()\n    self.t = (p.cos(), p.sin())\nh = h * self.t[0] + self.t[1]",
        init="self.t = None",
    ),
    member(
        "cache by its key",
        "k = (x.shape[1], x.dtype)\nif self.key != k:\n    self.key, self.t = k, torch.arange(8).float()\nh = h * self.t",
        init="self.key = self.t = None",
    ),
]
OUTER_CACHES = [
    member(
        "lru_cache", "h = h * table(8)", head="@functools.lru_cache\ndef table(n):\n    return torch.arange(n).float().cos()\n"
    ),
    member("lru_cache of a number", "h = h * table(8)", head="@functools.lru_cache\ndef table(n):\n    return n ** -0.5\n"),
    member(
        "cached_property",
        "h = h * self.table",
        init="type(self).table = cached",
        head="cached = functools.cached_property(lambda s: torch.arange(8).float().cos())\ncached.__set_name__(None, 'table')",
    ),
    member("global dict", "if 8 not in T:\n    T[8] = torch.arange(8).float().cos()\nh = h * T[8]", head="T = {}"),
    member("global None", "global T\nif T is None:\n    T = torch.arange(8).float().cos()\nh = h * T", head="T = None"),
    member(
        "class dict",
        "if 8 not in self.t:\n    self.t[8] = torch.arange(8).float()\nh = h * self.t[8]",
        init="type(self).t = {}",
    ),
    member(
        "helper object",
        "h = h * self.r.get(8)",
        init="self.r = R()",
        head="class R:\n    def __init__(self):\n        self.c = {}\n"
        "    def get(self, n):\n        if n not in self.c:\n            self.c[n] = torch.arange(n).float().cos()\n"
        "        return self.c[n]\n",
    ),
    member(
        "slots",
        "h = h * self.r.get()",
        init="self.r = R()",
        head="class R:\n    __slots__ = ('c',)\n    def get(self):\n"
        "        if not hasattr(self, 'c'):\n            self.c = torch.arange(8).float().cos()\n        return self.c\n",
    ),
    member(
        "function attribute",
        "h = h * table()",
        head="def table():\n    if not hasattr(table, 't'):\n"
        "        table.t = torch.arange(8).float().cos()\n    return table.t\n",
    ),
    member(
        "default dict",
        "h = h * table(8)",
        head="def table(n, c={}):\n    if n not in c:\n        c[n] = torch.arange(n).float()\n    return c[n]\n",
    ),
    member(
        "closure",
        "h = h * table()",
        head="def make():\n    t = None\n    def table():\n        nonlocal t\n        if t is None:\n"
        "            t = torch.arange(8).float()\n        return t\n    return table\ntable = make()",
    ),
    member(
        "weak dictionary",
        "h = h * table(self)",
        head="import weakref\nT = weakref.WeakKeyDictionary()\ndef table(m):\n"
        "    if m not in T:\n        T[m] = torch.arange(8).float()\n    return T[m]\n",
    ),
    member(
        "of the input's values",
        "if self.t is None:\n    self.t = x.detach().mean(0)\nh = h * self.t",
        init="self.t = None",
        allowed=ANY,
    ),
    member(
        "of a weight", "if self.t is None:\n    self.t = self.b.weight.detach().mean(0)\nh = h * self.t", init="self.t = None"
    ),
]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", LEFT, ids=ids(LEFT))
def test_what_is_left_is_there(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled(LEFT))
def test_what_a_submodule_leaves_is_there(of):
    check(inside(of))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", ELSEWHERE, ids=ids(ELSEWHERE))
def test_what_is_left_in_other_places_is_there_or_refused(of):
    check(type(of)(of.program, REFUSABLE, of.planned_from))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled([*CACHES, *OUTER_CACHES], 2))
def test_a_full_cache_is_planned(of):
    program = of.program.within(warm=1, steps=(Step(),) * 4)
    check(type(of)(program, REFUSABLE if of in OUTER_CACHES else frozenset({"same"}), 1))


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", [*CACHES, *OUTER_CACHES], ids=ids([*CACHES, *OUTER_CACHES]))
def test_an_empty_cache_fills_as_in_eager(of):
    program = of.program.within(steps=(Step(),) * 4)
    check(type(of)(program, ANY if of in OUTER_CACHES else GUARDED, None if of in OUTER_CACHES else 2))


@pytest.mark.parametrize("of", sampled(CACHES))
def test_an_empty_cache_of_a_submodule_fills_as_in_eager(of):
    check(inside(type(of)(of.program.within(steps=(Step(),) * 4), GUARDED, 2)))


def test_eager_shows_nothing_against_itself():
    check_against_itself([*LEFT, *ELSEWHERE, *CACHES, *OUTER_CACHES])
