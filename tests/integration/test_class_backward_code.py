"""Code of the model's own that runs in the backward: what it reads is compared before each call, what it changes is refused."""

import re

import pytest

from tests.support.harness import outcome
from tests.support.members import ANY, check, ids, member
from tests.support.source import Step

HEAD = """
C = {'n': 0, 'k': 2.0}
class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h): return h * 1.0
    @staticmethod
    def backward(ctx, g): return g * C['k']
class Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, k):
        ctx.k = k
        return h * 1.0
    @staticmethod
    def backward(ctx, g): return g * ctx.k, None
class Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, k):
        ctx.k = k
        return h * 1.0
    @staticmethod
    def backward(ctx, g): return g * ctx.k[0], None
class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h): return h * 1.0
    @staticmethod
    def backward(ctx, g):
        C['n'] += 1
        return g * 2
packed = torch.autograd.graph.saved_tensors_hooks
def helper(m, g): return g * m.scale
def hook(m, g): return helper(m, g)
class Owned(torch.autograd.Function):
    k = 2.0
    @staticmethod
    def forward(ctx, h): return h * 1.0
    @staticmethod
    def backward(ctx, g): return g * Owned.k
class SetUp(torch.autograd.Function):
    @staticmethod
    def forward(h, m): return h * 1.0
    @staticmethod
    def setup_context(ctx, inputs, output): ctx.m = inputs[1]
    @staticmethod
    def backward(ctx, g): return g * ctx.m.scale, None
def own_attribute(g): return g * own_attribute.k
class Space:
    k = 2.0
    @staticmethod
    def f(g): return g * Space.k
helpers = types.ModuleType("helpers")
exec("K = 2.0\\ndef f(g): return g * K", vars(helpers))
class Scale(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k
    def forward(self, g): return g * self.k
class Kind(enum.Enum): A = 1
Kind.A.factor = 2.0
class Lam: k = 2.0
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h): return h * 1.0
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g * Lam.k
class Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.f = of_lam
        return h * 1.0
    @staticmethod
    def backward(ctx, g): return ctx.f(g)
class Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, f):
        ctx.f = f
        return h * 1.0
    @staticmethod
    def backward(ctx, g): return ctx.f(g), None
def of_lam(g): return g * Lam.k
@torch.no_grad()
def decorated(g): return g * Lam.k
@functools.lru_cache
def cached(): return Lam.k
class Table:
    def __init__(self): self.hidden = 2.0
    def __getitem__(self, i): return self.hidden
    def __float__(self): return self.hidden
class Dotted:
    def __init__(self): self.__dict__['held'] = {'k': 2.0}
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        return self.__dict__['held'][name]
class Descriptor:
    def __init__(self): self.hidden = 2.0
    def __get__(self, obj, kind): return self.hidden
class Described: d = Descriptor()
def with_default(g, c=[2.0]): return g * c[0]
def scaled(g): return g * C['k']
own_attribute.k = 2.0
class Cfg:
    def __init__(self): self.k, self.o = 2.0, 1.0
    def f(self, g): return g * self.k
CFG = Cfg()
class Hook:
    def __init__(self, m): self.m = m
    def __call__(self, g): return g * self.m.scale
"""
INIT = """
self.scale, self.cfg, self.kept = 2.0, types.SimpleNamespace(k=2.0), None
self.l, self.cell = nn.ModuleList([nn.Linear(8, 8)]), [2.0]
self.l[0].scale = 2.0
self.c2 = Cfg()
self.cfgs, self.f, self.table, self.act, self.kind = [Cfg()], scaled, {'f': scaled}, Scale(2.0), Kind.A
self.t, self.dotted, self.described, self.deque = Table(), Dotted(), Described(), collections.deque([of_lam])
"""
CHANGES = (
    "part.scale = 3.0\npart.cfg.k = part.c2.k = 5.0\n"
    "C['k'] = Owned.k = own_attribute.k = part.l[0].scale = part.cell[0] = 4.0\n"
    "CFG.k = Space.k = helpers.K = part.act.k = Kind.A.factor = part.cfgs[0].k = with_default.__defaults__[0][0] = 6.0\n"
    "Lam.k = part.t.hidden = part.dotted.__dict__['held']['k'] = Described.__dict__['d'].hidden = 7.0"
)
READS = {
    "hook": "h.register_hook(lambda g: g * self.scale)",
    "hook of an object's attribute": "h.register_hook(lambda g: g * self.cfg.k)",
    "hook that is a method": "self.by = types.MethodType(hook, self)\nh.register_hook(self.by)",
    "hook that calls another function": "h.register_hook(lambda g: hook(self, g))",
    "hook that is a partial": "h.register_hook(functools.partial(hook, self))",
    "hook that is an object": "h.register_hook(Hook(self))",
    "hook of a global": "h.register_hook(lambda g: g * C['k'])",
    "hook of a submodule in a list": "h.register_hook(lambda g: g * self.l[0].scale)",
    "hook that goes over submodules": "h.register_hook(lambda g: sum(g * m.scale for m in self.l))",
    "hook of a cell's list": "cell = self.cell\nh.register_hook(lambda g: g * cell[0])",
    "hook by getattr": "h.register_hook(lambda g: g * getattr(self, 'scale'))",
    "hook by a made name": "h.register_hook(lambda g: g * getattr(self, 'sca' + 'LE'.lower()))",
    "hook by the dictionary": "h.register_hook(lambda g: g * vars(self)['scale'])",
    "hook of another attribute than the forward's": "h = h * self.c2.o\nh.register_hook(lambda g: g * self.c2.k)",
    "hook of an object's method": "h.register_hook(lambda g: self.c2.f(g))",
    "hook that is an object's method": "h.register_hook(self.c2.f)",
    "hook by getattr of an object": "h.register_hook(lambda g: g * getattr(self.c2, 'k'))",
    "hook by the dictionary of an object": "h.register_hook(lambda g: g * vars(self.cfg)['k'])",
    "hook of a method by getattr": "h.register_hook(lambda g: getattr(self.c2, 'f')(g))",
    "hook of its own attribute": "h.register_hook(own_attribute)",
    "hook of a global object's method": "h.register_hook(lambda g: CFG.f(g))",
    "hook of a class's function": "h.register_hook(lambda g: Space.f(g))",
    "hook of a Python module's function": "h.register_hook(lambda g: helpers.f(g))",
    "hook of an attribute that is a function": "h.register_hook(lambda g: self.f(g))",
    "hook of a table's function": "h.register_hook(lambda g: self.table['f'](g))",
    "hook of a submodule that it calls": "h.register_hook(lambda g: self.act(g))",
    "hook of an enumeration": "h.register_hook(lambda g: g * self.kind.factor)",
    "hook of an object in a list": "c = self.cfgs[0]\nh.register_hook(lambda g: g * c.k)",
    "hook of a default": "h.register_hook(with_default)",
    "Function that is given a list": "h = Listed.apply(h, self.cell)",
    "Function whose backward is decorated": "h = Once.apply(h)",
    "Function that stores a function": "h = Stored.apply(h)",
    "Function that is handed a function": "h = Handed.apply(h, of_lam)",
    "Function that is handed a method": "h = Handed.apply(h, self.c2.f)",
    "hook that calls a decorated function": "h.register_hook(lambda g: decorated(g))",
    "hook by an item": "h.register_hook(lambda g: g * self.t[0])",
    "hook by a number": "h.register_hook(lambda g: g * float(self.t))",
    "hook by a made up attribute": "h.register_hook(lambda g: g * self.dotted.k)",
    "hook by a descriptor": "h.register_hook(lambda g: g * self.described.d)",
    "hook that goes over children": (
        "def f(g):\n    for m in self.children():\n        g = m(g) if isinstance(m, Scale) else g\n    return g\n"
        "h.register_hook(f)"
    ),
    "hook of a deque": "h.register_hook(lambda g: self.deque[0](g))",
    "hook of a node": "h = torch.tanh(h)\nh.grad_fn.register_prehook(lambda g: tuple(each * self.scale for each in g))",
    "Function of its class": "h = Owned.apply(h)",
    "Function with setup_context": "h = SetUp.apply(h, self)",
    "Function": "h = Scaled.apply(h)",
    "Function that is given it": "h = Given.apply(h, self.scale)",
    "saved tensors": "with packed(lambda t: t, lambda t: t * self.scale):\n    h = h * h.exp()",
}
REFUSED = {"saved tensors": "saved_tensors_hooks", "hook of a node": "grad_fn", "hook that is a method": "leads to the model"}
STEPS = (Step(), Step(before=CHANGES), Step(), Step())
MEMBERS = [
    member(name, text, init=INIT, head=HEAD, steps=STEPS, allowed=ANY, planned_from=None) for name, text in READS.items()
]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_what_the_backwards_code_reads_is_compared(of):
    check(of, audit=False)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_it_is_planned_while_nothing_changes(of):
    program = of.program
    made = member(of.name, program.forward, init=program.init, head=program.head, allowed=ANY, planned_from=0)
    found = check(made)
    word = REFUSED.get(of.name)
    assert found.verdict == ("refused" if word else "same"), found
    assert not word or word in found.messages[0]


LATE_STEPS = (Step(), Step("changed", between=CHANGES), Step())
BY_ANY_NAME = {name for name, text in READS.items() if "getattr" in text or "vars(" in text or "dotted" in text}
OTHERS = "part.training = part.unread = False\npart.l[0].unread = part.cfg.unread = 1"


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_what_changes_before_the_backward_is_an_error(of):
    found = outcome(of.program.within(steps=LATE_STEPS))
    if of.name not in REFUSED:
        assert found.verdict == "refused" and re.search(r"BackwardError: .* and was ", found.messages[-1])


SET = "h.register_hook(lambda g: g * (1 if self.w is None else 2))"
HELD = "def f(g):\n    return g * len(c)\nh.register_hook(f)"
LATE = {
    "tensor": ("h.register_hook(lambda g: g * self.s)", "self.s = torch.tensor(2.0)", "part.s = torch.tensor(5.0)"),
    "tensor in place": ("h.register_hook(lambda g: g * self.s)", "self.s = torch.tensor(2.0)", "part.s.mul_(2)"),
    "tensor in a list": ("h.register_hook(lambda g: g * self.s[0])", "self.s = [torch.ones(1)]", "part.s[0] = torch.zeros(1)"),
    "tensor of an object": (
        "h.register_hook(lambda g: g * self.cfg.k)",
        "self.cfg.k = torch.ones(1)",
        "part.cfg.k = torch.zeros(1)",
    ),
    "array": ("h.register_hook(lambda g: g * float(self.s[0]))", "self.s = np.ones(1)", "part.s[0] = 3.0"),
    "what the forward wrote": ("self.n = 3\nh.register_hook(lambda g: g * self.n)", "self.n = 1", "part.n = 4"),
    "submodule": ("h.register_hook(lambda g: g * self.l[0].scale)", "", "part.l[0] = nn.Linear(1, 1)\npart.l[0].scale = 3.0"),
    "function": ("h.register_hook(lambda g: self.f(g))", "self.f = lambda g: g * 2", "part.f = lambda g: g * 3"),
    "nothing to a list": (SET, "self.w = None", "part.w = [1]"),
    "nothing to a tensor": (SET, "self.w = None", "part.w = torch.ones(1)"),
    "tensor to nothing": (SET, "self.w = torch.ones(1)", "part.w = None"),
    "list to nothing": (SET, "self.w = [1]", "part.w = None"),
    "gone": ("h.register_hook(lambda g: g * (1 if hasattr(self, 'w') else 2))", "self.w = 5", "del part.w"),
    "partial's": ("h.register_hook(functools.partial(lambda c, g: g * c[0], self.cell))", "", "part.cell[0] = 3.0"),
    "dictionary in one": (f"c = self.d['a']\n{HELD}", "self.d = {'a': {'b': 2.0}}", "part.d['a']['c'] = 3.0"),
    "dictionary in an object": (f"c = self.cfg.d\n{HELD}", "self.cfg.d = {'b': 2.0}", "part.cfg.d['c'] = 3.0"),
    "submodules that change places": (
        "h.register_hook(lambda g: g * self.p.scale)",
        "self.p, self.q = nn.Linear(8, 8), nn.Linear(8, 8)\nself.p.scale, self.q.scale = 2.0, 3.0",
        "part.p, part.q = part.q, part.p",
    ),
    "a submodule that is gone": ("h.register_hook(lambda g: g * len(self.l))", "", "del part.l"),
    "number of a tensor": ("h.register_hook(lambda g: g * float(self.s))", "self.s = torch.tensor(2.0)", "part.s.fill_(5)"),
    "set": (f"c = self.s\n{HELD}", "self.s = {1}", "part.s.add(5)"),
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("forward", "init", "between"), LATE.values(), ids=LATE.keys())
def test_other_kinds_that_change_before_the_backward(forward, init, between):
    made = member("late", forward, init=INIT + init, head=HEAD, steps=LATE_STEPS, planned_from=None)
    unchanged = made.program.within(steps=(Step(), Step()))
    assert outcome(unchanged).verdict == "same"
    found = outcome(made.program.within(steps=(Step(), Step("changed", between=between))))
    assert found.verdict == "refused" and "BackwardError: " in found.messages[-1], found


DRAWN = {
    "Python's": ("h.register_hook(lambda g: g * random.random())", "random generator"),
    "numpy's": ("h.register_hook(lambda g: g * float(np.random.rand()))", "random generator"),
    "the clock": ("h.register_hook(lambda g: g * time.time())", "clock"),
    "a Function's": ("h = Random.apply(h)", "random generator"),
}
RANDOM = """
import time
class Random(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h): return h * 1.0
    @staticmethod
    def backward(ctx, g): return g * random.random()
"""


@pytest.mark.parametrize(("text", "word"), DRAWN.values(), ids=DRAWN.keys())
def test_numbers_that_the_backward_draws_are_refused(text, word):
    found = outcome(
        member("draws", text, head=f"{HEAD}{RANDOM}", steps=(Step(),) * 3, planned_from=None, ignored="time").program
    )
    assert found.verdict == "refused" and word in found.messages[0], found


def test_a_hook_that_names_nothing_is_compared_too():
    head = f"{HEAD}def hooked(g, c=1.0): return g * c\n"
    of = member("unnamed", "h.register_hook(hooked)", head=head, planned_from=None)
    assert outcome(of.program.within(steps=(Step(), Step()))).verdict == "same"
    found = outcome(of.program.within(steps=(Step(), Step("changed", between="hooked.__defaults__ = (3.0,)"))))
    assert found.verdict == "refused" and "BackwardError" in found.messages[-1], found


def test_training_mode_is_compared_where_the_backward_reads_it():
    of = member("mode", "h.register_hook(lambda g: g * 2 if self.training else g)", planned_from=None)
    found = outcome(of.program.within(steps=(Step(), Step("changed", between="m.eval()"))))
    assert found.verdict == "refused" and "training mode" in found.messages[-1], found


def test_context_variables_are_those_of_the_backward():
    head = f"{HEAD}VAR = contextvars.ContextVar('VAR', default=1.0)\n"
    of = member("context", "h.register_hook(lambda g: g * VAR.get())", head=head, planned_from=None)
    found = outcome(of.program.within(steps=(Step(), Step("changed", between="VAR.set(3.0)"))))
    assert found.verdict == "refused" and "BackwardError" in found.messages[-1], found


def test_numbers_that_the_backward_does_not_use_are_counted():
    text = "self.n += 1\nh = Given.apply(h, self.scale)"
    found = outcome(member("counted", text, init="self.n, self.scale = 0, 2.0", head=HEAD, steps=(Step(),) * 4).program)
    assert found.verdict == "same" and all(found.planned), found


WRITTEN = {
    "tensor": "self.s = h.detach().mean()\nh.register_hook(lambda g: g * self.s)",
    "list": "self.aux.append(h.detach())\nh.register_hook(lambda g: g * len(self.aux))",
    "list that is held": "self.aux.append(h.detach())\naux = self.aux\ndef f(g):\n    return g * len(aux)\nh.register_hook(f)",
    "attribute of an object": "o = self.c2\no.t = h.detach().mean()\nh.register_hook(lambda g: g * o.t)",
    "item": "self.d['t'] = h.detach().mean()\nh.register_hook(lambda g: g * self.d['t'])",
    "by getattr": "self.s = h.detach().mean()\nh.register_hook(lambda g: g * getattr(self, 's'))",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
def test_what_the_forward_leaves_is_not_read_in_the_backward(text):
    init = f"{INIT}self.s, self.aux, self.d, self.c2.t = None, [], {{'t': None}}, None"
    found = outcome(member("written", text, init=init, head=HEAD, steps=(Step(),) * 3, planned_from=None).program)
    assert found.verdict == "refused" and "CaptureError" in found.messages[0], found


GIVEN = {
    "dictionary": ("{'k': 2.0}", "h.register_hook(lambda g: g * b['k'])"),
    "list": ("[2.0]", "h.register_hook(lambda g: g * b[0])"),
    "object": ("types.SimpleNamespace(k=2.0)", "h.register_hook(lambda g: g * b.k)"),
    "list of a Function": ("[2.0]", "h = Listed.apply(h, b)"),
}


@pytest.mark.parametrize(("given", "text"), GIVEN.values(), ids=GIVEN.keys())
def test_arguments_that_the_backward_reads_are_refused(given, text):
    made = member("given", text, init=INIT, head=HEAD, steps=(Step(),) * 3, planned_from=None)
    found = outcome(made.program.within(signature="self, x, b", given=f"torch.randn(16, 8), {given}"))
    assert found.verdict == "refused" and "of the call's arguments" in found.messages[0], found


@pytest.mark.parametrize("text", ["ENV['S9']", "getattr(os, 'environ')['S9']", "os.getenv('S9')"])
def test_the_environment_is_refused_by_any_name(text):
    head = f"{HEAD}from os import environ as ENV\nENV['S9'] = '2'\n"
    found = outcome(member("environ", f"h.register_hook(lambda g: g * float({text}))", init=INIT, head=head).program)
    assert found.verdict == "refused" and "environment" in found.messages[0], found


def test_lists_that_the_loop_empties_may_be_emptied_before_the_backward():
    text = "self.aux.append(h.square().mean())\nh.register_hook(lambda g: g * self.scale)"
    steps = (Step("changed", between="part.aux.clear()"),) * 3
    found = outcome(member("aux", text, init=f"{INIT}self.aux = []", head=HEAD, steps=steps).program)
    assert found.verdict == "same" and all(found.planned)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_what_it_does_not_read_may_change_before_the_backward(of):
    found = outcome(of.program.within(steps=(Step("changed", between=OTHERS),) * 3))
    assert found.verdict == ("refused" if of.name in {*REFUSED, *BY_ANY_NAME} else "same"), found.messages


CHANGE = {
    "hook that keeps the gradient": "h.register_hook(lambda g: setattr(self, 'kept', g))",
    "hook that keeps a number": "h.register_hook(lambda g: setattr(self, 'kept', 1))",
    "hook that counts": "h.register_hook(lambda g: C.update(n=C['n'] + 1))",
    "hook that appends": "h.register_hook(lambda g: self.cfg.__dict__.setdefault('seen', []).append(1))",
    "Function that counts": "h = Counting.apply(h)",
}


@pytest.mark.parametrize("text", CHANGE.values(), ids=CHANGE.keys())
def test_what_the_backwards_code_changes_is_refused(text):
    found = check(member("changes", text, init=INIT, head=HEAD, allowed=ANY, planned_from=None), audit=False)
    assert found.verdict == "refused" and "backward" in found.messages[0], found


COUNTED = {
    "Function": "h = Given.apply(h, 1.0 + (self.n % 3))",
    "hook": "h.register_hook(lambda g: g * 2 if self.n % 3 == 0 else g)",
    "saved": "with packed(lambda t: t, lambda t: t * (1 + self.n % 3)):\n    h = h * h.exp()",
}


@pytest.mark.parametrize("text", COUNTED.values(), ids=COUNTED.keys())
def test_numbers_that_the_backward_uses_are_not_counted(text):
    steps = tuple(Step() for _ in range(5))
    of = member("counts", f"self.n += 1\n{text}", init="self.n = 0", head=HEAD, steps=steps, allowed=ANY, planned_from=None)
    check(of, audit=False)


APART = {
    "read by a part": ("C['n'] += 1\nh = self.s(h)", ""),
    "counted by a part": ("h = self.s(h)\nif C['m'] % 3 == 0:\n    h = h * 2", ""),
    "counted by a hook": ("h = self.a(x)\nif self.a.k % 3 == 0:\n    h = h * 2", "self.a.register_forward_hook(count)"),
}
PARTS = """
C = {'n': 0, 'm': 0}
class S(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)
    def forward(self, h):
        C['m'] += 1
        h = self.l(h) + self.l(h).detach().nonzero().sum() * 0
        return h * 2 if C['n'] % 3 == 1 else h
def count(m, a, o): m.k += 1
"""


@pytest.mark.parametrize("forward, init", APART.values(), ids=APART.keys())
def test_numbers_that_a_part_which_runs_as_it_is_uses_are_not_counted(forward, init):
    steps = tuple(Step() for _ in range(6))
    init = f"self.s = S()\nself.a.k = 0\n{init}"
    of = member("apart", forward, init=init, head=PARTS, steps=steps, allowed=ANY, planned_from=None)
    check(of, audit=False)
