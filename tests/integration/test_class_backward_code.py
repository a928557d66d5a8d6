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
own_attribute.k = 2.0
class Cfg:
    def __init__(self): self.k, self.o = 2.0, 1.0
    def f(self, g): return g * self.k
class Hook:
    def __init__(self, m): self.m = m
    def __call__(self, g): return g * self.m.scale
"""
INIT = """
self.scale, self.cfg, self.kept = 2.0, types.SimpleNamespace(k=2.0), None
self.l, self.cell = nn.ModuleList([nn.Linear(8, 8)]), [2.0]
self.l[0].scale = 2.0
self.c2 = Cfg()
"""
CHANGES = (
    "part.scale = 3.0\npart.cfg.k = part.c2.k = 5.0\nC['k'] = Owned.k = own_attribute.k = part.l[0].scale = part.cell[0] = 4.0"
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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_what_the_backwards_code_reads_is_compared(of):
    check(of, audit=False)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_it_is_planned_while_nothing_changes(of):
    program = of.program
    made = member(of.name, program.forward, init=program.init, head=program.head, allowed=ANY, planned_from=0)
    found = check(made)
    word = REFUSED.get(of.name)
    assert found.verdict == ("refused" if word else "same"), found
    assert not word or word in found.messages[0]


LATE_STEPS = (Step(), Step("changed", between=CHANGES), Step())
AT_THE_FORWARD = {"Function that is given it"}
OTHERS = "part.training = part.unread = False\npart.l[0].unread = part.cfg.unread = 1"
BY_ANY_NAME = {name for name, text in READS.items() if "getattr" in text or "vars(" in text}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("of", MEMBERS, ids=ids(MEMBERS))
def test_what_changes_before_the_backward_is_an_error(of):
    found = outcome(of.program.within(steps=LATE_STEPS))
    if of.name in AT_THE_FORWARD:
        assert found.verdict == "mismatch"
    elif of.name not in REFUSED:
        assert found.verdict == "refused" and re.search(r"BackwardError: .*changed before the backward", found.messages[-1])


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
    "set": (f"c = self.s\n{HELD}", "self.s = {1}", "part.s.add(5)"),
}


@pytest.mark.parametrize(("forward", "init", "between"), LATE.values(), ids=LATE.keys())
def test_other_kinds_that_change_before_the_backward(forward, init, between):
    made = member("late", forward, init=INIT + init, head=HEAD, steps=LATE_STEPS, planned_from=None)
    unchanged = made.program.within(steps=(Step(), Step()))
    assert outcome(unchanged).verdict == "same"
    found = outcome(made.program.within(steps=(Step(), Step("changed", between=between))))
    assert found.verdict == "refused" and "BackwardError: " in found.messages[-1], found


def test_lists_that_the_loop_empties_may_be_emptied_before_the_backward():
    text = "self.aux.append(h.square().mean())\nh.register_hook(lambda g: g * self.scale)"
    steps = (Step("changed", between="part.aux.clear()"),) * 3
    found = outcome(member("aux", text, init=f"{INIT}self.aux = []", head=HEAD, steps=steps).program)
    assert found.verdict == "same" and all(found.planned)


@pytest.mark.one_in(2)
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
