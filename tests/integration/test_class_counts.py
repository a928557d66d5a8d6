"""Numbers that the forward counts in Python, and that steer it by comparisons: counted by a plan as by the model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from planner import CaptureError, ExportError, MismatchWarning, export_source, plan, verify
from tests.support.members import ANY, GUARDED, check, ids, inside, member
from tests.support.source import Step

SLOTS = "class Slots:\n    __slots__ = ('n',)\n    def __init__(self):\n        self.n = 0\n"
LOOP = tuple(Step() for _ in range(5))

COUNTED = [
    member("int", "self.n += 1", init="self.n = 0"),
    member("float", "self.n += 0.5", init="self.n = 0.0"),
    member("an int that becomes a float", "self.n = self.n / 2 + 1", init="self.n = 0.0"),
    member("down", "self.n -= 1", init="self.n = 5"),
    member("doubled", "self.n = 2 * self.n + 1", init="self.n = 1"),
    member("powers", "self.n = self.n ** 2 % 7", init="self.n = 3"),
    member("bits", "self.n = (self.n << 1 ^ 5) & 255", init="self.n = 3"),
    member("of a class", "self.n += 1", init="type(self).n = 0", planned_from=1),
    member("global", "global G\nG += 1", head="G = 0"),
    member("dictionary", "self.v['n'] += 1\nself.v['rows'] += x.shape[0]", init="self.v = {'n': 0, 'rows': 0}"),
    member("list", "self.v[0] += 1", init="self.v = [0, 'a']"),
    member("namespace", "self.v.n += 1", init="self.v = types.SimpleNamespace(n=0)"),
    member("slots", "self.v.n += 1", init="self.v = Slots()", head=SLOTS),
    member("function", "count.n += 1", head="def count(): pass\ncount.n = 0"),
    member("two that depend on each other", "self.n, self.m = self.m, self.n + self.m", init="self.n = self.m = 1"),
    member("the last one kept", "self.last = self.n\nself.n += 1", init="self.n, self.last = 0, -1"),
    member("at most", "self.n = min(self.n + 1, 3)", init="self.n = 0", allowed=GUARDED, planned_from=None),
    member(
        "beside a carried tensor",
        "self.n += 1\nself.v = self.v * 0.5 + h.detach().mean(0)\nh = h + self.v",
        init="self.n, self.v = 0, torch.zeros(8)",
    ),
    member("beside a tensor that is left", "self.n += 1\nself.v = h.mean()", init="self.n = 0", losses="part.v"),
    member(
        "beside a cache",
        "self.n += 1\nif self.k is None:\n    self.k = torch.ones(8)\nh = h * self.k",
        init="self.n, self.k = 0, None",
        planned_from=1,
        allowed=GUARDED,
    ),
    member("beside a generator's numbers", "self.n += 1\nh = h + torch.rand(8)", init="self.n = 0"),
    member("as a condition that holds", "self.n += 1\nif self.n > 0:\n    h = h * 2", init="self.n = 0"),
    member("as a truth", "self.n += 1\nif self.n:\n    h = h * 2", init="self.n = 1"),
    member(
        "compared with None and texts", "self.n += 1\nif self.n != None and self.n != 'a':\n    h = h * 2", init="self.n = 0"
    ),
    member("asserted to be an int", "self.n += 1\nassert isinstance(self.n, int)", init="self.n = 0"),
]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", COUNTED, ids=ids(COUNTED))
def test_numbers_are_counted(of):
    check(member(of.name, **fields(of.program), **rest(of), steps=LOOP))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", COUNTED[::3], ids=ids(COUNTED[::3]))
def test_numbers_are_counted_in_a_submodule(of):
    check(inside(of))


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    "kind", ["in_flight", "accumulate", "twice", "evaluated", "no_grad", "transposed", "copied", "interrupted"]
)
@pytest.mark.parametrize("of", [COUNTED[0], COUNTED[9], COUNTED[14], COUNTED[17]], ids=lambda of: of.name)
def test_in_every_kind_of_step(of, kind):
    check(member(of.name, **fields(of.program), steps=(Step(), Step(kind), Step(), Step()), allowed=ANY, planned_to=1))


def fields(program):
    names = ("forward", "init", "head", "losses", "out")
    return {name: getattr(program, name) for name in names}


def rest(of):
    return {"allowed": of.allowed, "planned_from": of.planned_from}


STEERED = {
    "every third call": "self.n += 1\nif self.n % 3 == 0:\n    h = h * 2",
    "every third call, asked before": "if self.n % 3 == 0:\n    h = h * 2\nself.n += 1",
    "the first calls": "self.n += 1\nif self.n < 5:\n    h = h * 2",
    "until it is large": "self.n += 1\nif not self.n <= 4:\n    h = torch.relu(h)",
    "reset": "self.n += 1\nif self.n >= 4:\n    self.n = 0\n    h = h * 2",
    "one of several": "self.n += 1\nif self.n > 5:\n    h = h * 2\nelif self.n > 3:\n    h = h * 3",
    "max and min": "self.n += 1\nif max(self.n, 4) > 4:\n    h = h * 2",
    "between": "self.n += 1\nif 3 < self.n < 6:\n    h = h * 2",
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("forward", STEERED.values(), ids=STEERED.keys())
def test_comparisons_that_come_out_otherwise_have_plans_of_their_own(forward):
    steps = tuple(Step() for _ in range(8))
    of = member("steered", forward, init="self.n = 0", steps=steps)
    found = check(member("steered", forward, init="self.n = 0", steps=steps, allowed=GUARDED, planned_from=None), budget=20_000)
    assert found.verdict == "same" and all(found.planned), (found, of.program.source)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "before", ["part.n = 100", "part.n = 1.5", "part.n = True", "part.n = None", "del part.n", "part.n = torch.ones(())"]
)
def test_numbers_that_the_loop_sets(before):
    steps = (Step(), Step(before=before), Step(), Step())
    check(
        member(
            "set",
            "self.n += 1\nif self.n < 50:\n    h = h * 2",
            init="self.n = 0",
            steps=steps,
            allowed=GUARDED,
            planned_from=None,
        )
    )


USED = {
    "by a kernel": "h = h * self.n",
    "by a kernel, from the left": "h = self.n + h",
    "as a fill": "h = h + torch.full((8,), self.n)",
    "as an argument": "h = torch.mul(h, self.n)",
    "as an index": "h = h + h[self.n % 3]",
    "as the number of times": "for _ in range(self.n % 3):\n    h = torch.tanh(h)",
    "to choose a layer": "h = [self.a, self.b, self.c][self.n % 3](h)",
    "as a key": "h = h * {0: 1.0, 1: 2.0, 2: 3.0}[self.n % 3]",
    "as a probability": "h = F.dropout(h, 0.1 * (self.n % 5))",
    "as text": "h = h if str(self.n)[-1] in '13579' else h * 2",
    "formatted": "h = h if f'{self.n}'.endswith('2') else h * 2",
    "by math": "h = h * math.sqrt(self.n)",
    "as a float": "h = h * float(self.n)",
    "rounded": "h = h * round(self.n / 2)",
    "compared with a tensor": "h = torch.where(h > self.n, h, h * 2)",
    "by a method": "h = h * self.n.bit_length()",
    "appended": "self.v.append(self.n)",
    "in a tuple": "self.t = (self.n, 1)",
    "as a seed": "torch.manual_seed(self.n)\nh = h + torch.rand(8)",
    "in a new object": "self.o = types.SimpleNamespace(n=self.n)",
    "in a closure": "self.f = lambda n=self.n: n",
    "toggled": "self.b1 = self.n % 2 == 0\nh = h if self.b1 else h * 2",
    "alternating": "h = h if self.n % 2 else h * 2",
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("use", USED.values(), ids=USED.keys())
def test_numbers_that_are_used_in_another_way_are_refused(use):
    init = "self.n, self.v, self.t, self.o, self.f, self.b1 = 0, [], (), None, None, True"
    check(member("used", f"self.n += 1\n{use}", init=init, head="import math", steps=LOOP, allowed=ANY, planned_from=None))


SEVEN = tuple(Step() for _ in range(7))
SEEN_BY_OTHERS = {
    "equal to an IntEnum": "if self.n == M.LAST:\n    h = h * 2",
    "equal to numpy's": "if self.n == np.int64(5):\n    h = h * 2",
    "among others": "if self.n in (5, M.LAST):\n    h = h * 2",
    "equal to a fraction": "if self.n == fractions.Fraction(5):\n    h = h * 2",
    "above an object": "if self.n > Five():\n    h = h * 2",
    "its class asked": "if type(self.n) is int and self.n % 5 == 0:\n    h = h * 2",
    "its class by name": "if self.n.__class__.__name__ == 'int' and self.n % 5 == 0:\n    h = h * 2",
    "matched": "match self.n:\n    case int(n) if n % 5 == 0:\n        h = h * 2",
    "the same small int": "if self.n is M.FIVE:\n    h = h * 2",
    "the same as a global one": "if self.n is FIVE:\n    h = h * 2",
    "an error in time": "try:\n    1 / (5 - self.n)\nexcept ZeroDivisionError:\n    h = h * 2",
    "an error of a shift": "try:\n    1 << (4 - self.n)\nexcept ValueError:\n    h = h * 2",
    "a class by its type": "h = h * {int: 1.0, float: 2.0}.get(type(self.n), 3.0)",
    "kept by a cache": "h = h * half(self.n)",
    "kept by a default": "def f(n=self.n):\n    return n\nself.f = f",
    "in an array": "self.t = np.array([self.n])",
    "in bytes": "self.t = bytes([self.n])",
    "a power": "if self.n ** 0.5 > 2:\n    h = h * 2",
    "divmod": "if divmod(self.n, 5)[1] == 0:\n    h = h * 2",
    "another that a kernel is given": "h = h + torch.full((8,), self.m)\nself.m = self.n // 100",
    "a class that depends on the number": "if isinstance(2 ** (4 - self.n), float):\n    h = h * 2",
    "a counter that makes what is missing": "self.d['n'] += 1",
    "exchanged": "self.m, self.z = self.z, self.m + 1",
    "in a range": "if self.n in range(2, 5):\n    h = h * 2",
    "minus zero": "self.z = -self.z * 0.5\nif math.copysign(1, self.z) < 0:\n    h = h * 2",
    "not a number": "self.z = self.z * math.inf - math.inf\nif self.z != self.z:\n    h = h * 2",
}
OTHERS = """
import enum, fractions, functools, math
class M(enum.IntEnum):
    LAST = 5
M.FIVE = FIVE = 5
class Five:
    def __lt__(self, other): return other > 4
@functools.lru_cache
def half(n): return n / 2
"""


@pytest.mark.one_in(6)
@pytest.mark.parametrize("use", SEEN_BY_OTHERS.values(), ids=SEEN_BY_OTHERS.keys())
def test_numbers_that_other_code_sees_are_as_in_eager(use):
    init = "self.n, self.m, self.t, self.f, self.z = 0, 0, None, None, 0.0\nself.d = collections.defaultdict(int)"
    of = member("seen", f"self.n += 1\n{use}", init=init, head=OTHERS, steps=SEVEN, allowed=ANY, planned_from=None)
    check(of, audit=False, budget=20_000)


def test_an_error_that_a_later_count_raises_is_eagers():
    forward = "self.n -= 1\nunused = 6 / self.n"
    steps = tuple(Step() for _ in range(9))
    check(member("raises", forward, init="self.n = 7", steps=steps, allowed=ANY, planned_from=None), audit=False)


@pytest.mark.parametrize("condition", ["(1 << self.n) > 4", "self.n ** 0.5 > 1", "10 // self.n > 4"])
def test_arithmetic_that_fails_in_a_later_call_does_not_fail_planning(condition):
    steps = tuple(Step() for _ in range(5))
    of = member("fails later", f"self.n -= 1\nif {condition}:\n    h = h * 2", init="self.n = 9", steps=steps)
    check(member("fails later", **fields(of.program), steps=steps, allowed=ANY, planned_from=None), budget=20_000)


def test_two_counts_that_become_one():
    steps = (Step(), Step(before="part.q = part.p"), Step(), Step())
    forward = "self.p['n'] += 1\nself.q['n'] += 1"
    check(member("one", forward, init="self.p, self.q = {'n': 0}, {'n': 5}", steps=steps, allowed=GUARDED, planned_from=None))


@pytest.mark.parametrize("times", [24, 600])
def test_many_operations_in_one_call(times):
    forward = f"for _ in range({times}):\n    self.p, self.q = self.q, (self.p + self.q) % 1000\n    self.n += 1"
    check(member("many", forward, init="self.p = self.q = 1\nself.n = 0"))


def test_a_count_behind_a_view_that_cannot_be_written():
    forward = "self.d['n'] += 1\nh = h * (1 + (self.view['n'] < 0))"
    init = "self.d = {'n': 0}\nself.view = types.MappingProxyType(self.d)"
    check(member("behind a view", forward, init=init, allowed=ANY, planned_from=None))


def test_a_count_that_the_first_call_sets_is_followed():
    forward = "if self.n is None:\n    self.n = 0\nself.n += 1\nif self.n % 3 == 0:\n    h = h * 2"
    steps = tuple(Step() for _ in range(7))
    found = check(
        member("set first", forward, init="self.n = None", steps=steps, planned_from=1, allowed=GUARDED), budget=20_000
    )
    assert all(found.planned[1:]), found


def test_the_refusal_says_why_a_number_is_more_than_counted():
    class Used(Counts):
        def forward(self, x):
            self.share = float(self.n)
            return super().forward(x)

    with pytest.raises(CaptureError, match=r"from call to call .*__float__ is asked for"):
        plan(Used(), 1.0, (torch.randn(4, 8),), progress=False)


def test_a_number_that_is_returned_is_refused():
    check(
        member(
            "returned", "self.n += 1", init="self.n = 0", out="(self.c(h), self.n)", steps=LOOP, allowed=ANY, planned_from=None
        )
    )


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n, self.seen = nn.Linear(8, 8), nn.Linear(8, 8), 0, {"rows": 0}

    def forward(self, x):
        self.n += 1
        self.seen["rows"] += len(x)
        h = torch.tanh(self.a(x))
        if self.n % 4 == 0:
            h = h * 2
        return torch.sigmoid(self.b(h))


def test_a_plan_says_for_which_calls_it_is():
    model, x = Counts(), torch.randn(16, 8)
    planned = plan(model, 10_000, (x,), progress=False)
    assert (model.n, model.seen) == (0, {"rows": 0})
    assert "calls where ((n + 1) % 4) == 0 is True" in str(planned)
    for _ in range(8):
        planned(x).sum().backward()
        planned.zero_grad()
    (other,) = planned.alternatives
    assert (planned.num_planned_calls, other.num_planned_calls, planned.num_unplanned_calls) == (8, 2, 0)
    assert (model.n, model.seen) == (8, {"rows": 128})


def test_a_call_that_no_plan_is_for_says_which_comparison_differs():
    planned = plan(Counts(), 1.0, (torch.randn(16, 8),), progress=False)
    planned.original.n = 3
    with pytest.warns(MismatchWarning, match=r"\(\(n \+ 1\) % 4\) == 0 is True, planned for False"):
        planned(torch.randn(16, 8))
    assert planned.original.n == 4


def test_verify_copies_and_pickles_count():
    planned, x = plan(Counts(), 10_000, (torch.randn(16, 8),), progress=False), torch.randn(16, 8)
    report = verify(planned, (x,), rounds=1)
    assert not report.differences and not report.unplanned and planned.original.n == 0
    for other in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        other(x)
        assert (other.original.n, planned.original.n, other.num_planned_calls) == (1, 0, 1)


def test_an_exported_file_counts_nothing(tmp_path):
    with pytest.raises(ExportError, match="counts"):
        export_source(plan(Counts(), 10_000, (torch.randn(16, 8),), progress=False), tmp_path / "step.py")


def test_another_backward_is_of_the_same_outcome():
    """Its capture runs after the numbers have been counted on."""
    planned, x = plan(Counts(), 10_000, (torch.randn(16, 8),), progress=False), torch.randn(16, 8)
    plain = copy.deepcopy(planned.original)
    for _ in range(5):
        for module in (planned, plain):
            out = module(x)
            out.t().backward(torch.ones(8, 16))
        for ours, theirs in zip(planned.original.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    assert planned.num_unplanned_calls == 0


def test_equal_blocks_that_count():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(8, 8), 0

        def forward(self, x):
            self.n += 1
            return x + torch.tanh(self.a(x))

    model = nn.Sequential(*(Block() for _ in range(4)))
    planned, x = plan(model, 0.9, (torch.randn(256, 8),), progress=False), torch.randn(256, 8)
    for _ in range(3):
        planned(x).sum().backward()
        planned.zero_grad()
    assert [block.n for block in model] == [3] * 4 and planned.num_unplanned_calls == 0


def test_an_error_in_a_count_is_the_models_own():
    class Divides(Counts):
        def forward(self, x):
            self.n -= 1
            self.share = 6 / self.n
            return torch.sigmoid(self.b(torch.tanh(self.a(x))))

    model = Divides()
    model.n, model.share = 12, 0.0
    planned = plan(model, 1.0, (torch.randn(4, 8),), progress=False)
    for _ in range(11):
        planned(torch.randn(4, 8))
    assert (planned.num_planned_calls, model.n, model.share) == (11, 1, 6.0)
    with pytest.raises(ZeroDivisionError), pytest.warns(MismatchWarning, match="division by zero"):
        planned(torch.randn(4, 8))
