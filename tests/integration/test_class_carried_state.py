"""State that the forward carries from call to call outside of parameters and buffers: tensors are planned, the rest is seen."""

import pytest

from tests.support.itself import check_against_itself
from tests.support.members import ANY, GUARDED, REFUSABLE, check, ids, inside, member, sampled
from tests.support.source import Step

NEW = "0.9 * {} + 0.1 * h.detach().mean(0)"
PAIR = "Pair = collections.namedtuple('Pair', 'mean count')"
SLOTS = "class Memory:\n    __slots__ = ('mean',)\n    def __init__(self):\n        self.mean = torch.zeros(8)\n"
DATA = "@dataclasses.dataclass\nclass Memory:\n    mean: torch.Tensor\n    decay: float = 0.9\n"


def carried(name, place, init, *, write="{} = {}", **fields):
    """The mean of activations in a place that is read, and then written."""
    text = f"h = h - {place}\n" + write.format(place, NEW.format(place))
    return member(name, text, init=init, **fields)


TENSORS = [
    carried("attribute", "self.m", "self.m = torch.zeros(8)", measured=True),
    carried("list item", "self.m[0]", "self.m = [torch.zeros(8), 1]"),
    carried("dict item", "self.m['k']", "self.m = {'k': torch.zeros(8)}", measured=True),
    carried("dict of lists", "self.m['k'][1]", "self.m = {'k': [1, torch.zeros(8)]}"),
    carried("child's attribute", "self.a.m", "self.a.m = torch.zeros(8)"),
    carried("in place", "self.m", "self.m = torch.zeros(8)", write="{0}.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)"),
    carried("in place in a list", "self.m[1]", "self.m = [0, torch.zeros(8)]", write="{0}.copy_({1})"),
    carried("rows in place", "self.m.mean(0)", "self.m = torch.zeros(4, 8)", write="self.m[1:3] = h.detach()[:2]"),
    carried("buffer", "self.m", "self.register_buffer('m', torch.zeros(8))"),
    carried("buffer through its dict", "self._buffers['m']", "self.register_buffer('m', torch.zeros(8))"),
    carried(
        "buffer in place", "self.m", "self.register_buffer('m', torch.zeros(8))", write="{0}.lerp_(h.detach().mean(0), 0.1)"
    ),
    member(
        "tuple",
        "p, q = self.s\nh = h + p - q\nself.s = (h.detach().mean(0), p + 1)",
        init="self.s = (torch.zeros(8), torch.zeros(8))",
    ),
    member(
        "list that moves on",
        "h = h - torch.stack(self.q).mean(0)\nself.q.append(h.detach().mean(0))\nself.q.pop(0)",
        init="self.q = [torch.zeros(8) for _ in range(3)]",
    ),
    member(
        "deque",
        "h = h - self.q[0]\nself.q.append(h.detach().mean(0))",
        init="self.q = collections.deque([torch.zeros(8)] * 2, maxlen=2)",
    ),
    member(
        "two that change places",
        "h = h + self.p - self.q\nself.p, self.q = self.q, h.detach().mean(0)",
        init="self.p, self.q = torch.zeros(8), torch.ones(8)",
    ),
    member("integers", "h = h * (self.n + 1)\nself.n = self.n + 2", init="self.n = torch.tensor(1)"),
    member("mask", "h = h * self.k\nself.k = (h.detach() > 0).float()", init="self.k = torch.ones(16, 8)"),
    member(
        "bools", "h = torch.where(self.k, h, -h)\nself.k = h.detach() > 0", init="self.k = torch.zeros(16, 8, dtype=torch.bool)"
    ),
    member(
        "recurrent state",
        "h = torch.tanh(h + self.h @ self.b.weight)\nself.h = h.detach()",
        init="self.h = torch.zeros(16, 8)",
        measured=True,
    ),
    member(
        "dict replaced",
        "h = h - self.s['m']\nself.s = {'m': h.detach().mean(0), 'k': 1}",
        init="self.s = {'m': torch.zeros(8)}",
        allowed=GUARDED,  # the first call makes another dictionary
        planned_from=1,
    ),
    member(
        "written twice",
        "self.m = self.m + h.detach().mean(0)\nh = h - self.m\nself.m = self.m * 0.5",
        init="self.m = torch.zeros(8)",
    ),
    member(
        "computed name",
        "h = h - getattr(self, 'm' + '1')\nsetattr(self, 'm1', h.detach().mean(0))",
        init="self.m1 = torch.zeros(8)",
    ),
    member(
        "two forwards in flight",
        "h = h * (1 + self.m)\nself.m = h.detach().mean(0)",
        init="self.m = torch.zeros(8)",
        steps=(Step("in_flight"), Step("in_flight_in_order"), Step("joint")),
    ),
    member(
        "an exception between",
        "h = h - self.m\nself.m = h.detach().mean(0)",
        init="self.m = torch.zeros(8)",
        steps=(Step(), Step("bad_shape"), Step(), Step()),
        allowed=GUARDED,
        planned_to=1,
    ),
    member(
        "evaluated between",
        "h = h - self.m\nself.m = h.detach().mean(0)",
        init="self.m = torch.zeros(8)",
        steps=(Step(), Step("evaluated"), Step("no_grad"), Step()),
        allowed=GUARDED,
        planned_to=1,
    ),
    member(
        "set by the loop",
        "h = h - self.m\nself.m = h.detach().mean(0)",
        init="self.m = torch.zeros(8)",
        steps=(Step(), Step(before="part.m = torch.ones(8)"), Step(before="part.m.fill_(2.0)")),
    ),
]

LATE = [
    member("None first", "h = h if self.m is None else h - self.m\nself.m = h.detach().mean(0)", init="self.m = None"),
    member("made by the forward", "h = h - getattr(self, 'm', 0.0)\nself.m = h.detach().mean(0)"),
    member("empty list first", "h = h - (self.q[-1] if self.q else 0.0)\nself.q[:] = [h.detach().mean(0)]", init="self.q = []"),
    member("empty dict first", "h = h - self.s.get('m', 0.0)\nself.s['m'] = h.detach().mean(0)", init="self.s = {}"),
    member(
        "queue that fills",
        "h = h - sum(self.q)\nself.q.append(h.detach().mean(0))",
        init="self.q = collections.deque(maxlen=2)",
    ),
    member(
        "empty buffer first",
        "h = h if self.m is None else h - self.m\nself.m = h.detach().mean(0)",
        init="self.register_buffer('m', None)",
    ),
]
"""A first call is another one: it may run unplanned, and the rest is planned."""

ELSEWHERE = [
    carried("namespace", "self.s.m", "self.s = types.SimpleNamespace(m=torch.zeros(8))"),
    carried("slots", "self.s.mean", "self.s = Memory()", head=SLOTS),
    carried("dataclass", "self.s.mean", "self.s = Memory(torch.zeros(8))", head=DATA),
    carried("object in a list", "self.s[0].mean", "self.s = [Memory()]", head=SLOTS),
    carried("class attribute", "type(self).m", "type(self).m = torch.zeros(8)"),
    carried("global dict", "G['m']", "", head="G = {'m': torch.zeros(8)}"),
    carried("global list in place", "G[0]", "", head="G = [torch.zeros(8)]", write="{0}.copy_({1})"),
    carried("function attribute", "keep.m", "", head="def keep(): pass\nkeep.m = torch.zeros(8)"),
    carried("tensor's attribute", "self.a.weight.m", "self.a.weight.m = torch.zeros(8)"),
    carried("data of a tensor", "self.m", "self.m = torch.zeros(8)", write="{0}.data = {1}"),
    carried("set_ of a tensor", "self.m", "self.m = torch.zeros(8)", write="{0}.set_({1})"),
    carried("numpy array", "torch.from_numpy(self.m)", "self.m = np.zeros(8, 'f')", write="self.m = ({1}).numpy()"),
    carried(
        "memory shared with numpy", "torch.from_numpy(self.m)", "self.m = np.zeros(8, 'f')", write="self.m[:] = ({1}).numpy()"
    ),
    member(
        "namedtuple",
        "h = h - self.s.mean\nself.s = Pair(h.detach().mean(0), self.s.count)",
        init="self.s = Pair(torch.zeros(8), 1)",
        head=PAIR,
    ),
    member(
        "closure",
        "h = step(h)",
        head="def make():\n    m = torch.zeros(8)\n    def step(h):\n        nonlocal m\n        h = h - m\n"
        "        m = h.detach().mean(0)\n        return h\n    return step\nstep = make()",
    ),
    member(
        "default argument",
        "h = step(h)",
        head="def step(h, s=[torch.zeros(8)]):\n    h = h - s[0]\n    s[0] = h.detach().mean(0)\n    return h\n",
    ),
    member("global", "global M\nh = h - M\nM = h.detach().mean(0)", head="M = torch.zeros(8)"),
    member(
        "context variable",
        "h = h - C.get()\nC.set(h.detach().mean(0))",
        head="C = contextvars.ContextVar('C', default=torch.zeros(8))",
    ),
    member("growing list", "h = h - sum(self.q)\nself.q.append(h.detach().mean(0))", init="self.q = [torch.zeros(8)]"),
    member(
        "gradients flow on",
        "h = h + self.s\nself.s = h * 0.5",
        init="self.s = torch.zeros(16, 8)",
        steps=(Step("joint"), Step("joint", "part.s = part.s.detach()"), Step("joint", "part.s = part.s.detach()")),
    ),
]
"""Places where a plan may carry it, or where it is refused by name."""

NUMBERS = [
    member("counter", "self.n += 1\nh = h * self.n", init="self.n = 0", word=r"\bn\b"),
    member("decay", "self.r = self.r * 0.5\nh = h * self.r", init="self.r = 1.0", word=r"\br\b"),
    member("made by the forward", "self.t = getattr(self, 't', 1.0) * 0.5\nh = h * self.t", word=r"\bt\b"),
    member(
        "toggle",
        "self.on = not self.on\nh = torch.relu(h) if self.on else torch.tanh(h)",
        init="self.on = False",
        word=r"\bon\b",
    ),
    member("text", "self.s += 'x'\nh = h * len(self.s)", init="self.s = ''", word=r"\bs\b"),
    member("counter in a dict", "self.s['n'] += 1\nh = h * self.s['n']", init="self.s = {'n': 0}", word=r"\bs\b"),
    member("counter in a list", "self.s[0] += 1\nh = h * self.s[0]", init="self.s = [0]", word=r"\bs\b"),
    member("length of a list", "self.s.append(0)\nh = h * len(self.s)", init="self.s = []", word=r"\bs\b"),
    member("growing set", "self.s.add(len(self.s))\nh = h * len(self.s)", init="self.s = set()", word=r"\bs\b"),
    member("Counter", "self.s.update('a')\nh = h * self.s['a']", init="self.s = collections.Counter()", word=r"\bs\b"),
    member("tuple", "self.s = (self.s[0] + 1, 2)\nh = h * self.s[0]", init="self.s = (0, 2)", word=r"\bs\b"),
    member("turning deque", "self.s.rotate()\nh = h * self.s[0]", init="self.s = collections.deque([1, 2, 3])", word=r"\bs\b"),
    member("namespace", "self.s.n += 1\nh = h * self.s.n", init="self.s = types.SimpleNamespace(n=0)", word=r"\bs\b|\bn\b"),
    member(
        "slots",
        "self.s.n += 1\nh = h * self.s.n",
        init="self.s = S()",
        word=r"\bs\b|\bn\b",
        head="class S:\n    __slots__ = ('n',)\n    def __init__(self):\n        self.n = 0\n",
    ),
    member("iterator", "h = h * next(self.s)", init="self.s = iter([1, 2, 3, 4, 5, 6, 7, 8, 9])", word=r"\bs\b"),
    member("cycle", "h = h * next(self.s)", init="self.s = itertools.cycle([1, 2, 3])", word=r"\bs\b"),
    member("count", "h = h * next(self.s)", init="self.s = itertools.count(1)", word=r"\bs\b"),
    member(
        "generator",
        "h = h * next(self.s)",
        init="self.s = numbers()",
        word=r"\bs\b|numbers",
        head="def numbers():\n    n = 0\n    while True:\n        n += 1\n        yield n\n",
    ),
    member("global counter", "global N\nN += 1\nh = h * N", head="N = 0", word=r"\bN\b"),
    member("class counter", "type(self).n += 1\nh = h * self.n", init="type(self).n = 0", word=r"\bn\b"),
    member("function attribute", "keep.n += 1\nh = h * keep.n", head="def keep(): pass\nkeep.n = 0", word=r"keep|\bn\b"),
    member(
        "closure",
        "h = h * count()",
        head="def make():\n    n = 0\n    def count():\n        nonlocal n\n        n += 1\n"
        "        return n\n    return count\ncount = make()",
        word=r"count|\bn\b",
    ),
    member("default list", "h = h * count()", head="def count(s=[0]):\n    s[0] += 1\n    return s[0]\n", word=r"count|\bs\b"),
    member(
        "context variable", "C.set(C.get() + 1)\nh = h * C.get()", head="C = contextvars.ContextVar('C', default=0)", word="C"
    ),
    member(
        "environment",
        "os.environ['FUZZ_N'] = os.environ.get('FUZZ_N', '') + 'x'\nh = h * len(os.environ['FUZZ_N'])",
        word="environ|FUZZ_N",
    ),
    member("numpy array in place", "self.s[0] += 1\nh = h * float(self.s[0])", init="self.s = np.zeros(1)", word=r"\bs\b"),
    member(
        "partial replaced",
        "h = h * self.s()\nself.s = functools.partial(int, self.s() + 1)",
        init="self.s = functools.partial(int, 1)",
        word=r"\bs\b",
    ),
    member(
        "class replaced",
        "h = h * self.s.k\nself.s.__class__ = B if type(self.s) is A else A",
        init="self.s = A()",
        word=r"\bs\b",
        head="class A:\n    k = 1\nclass B:\n    k = 3\n",
    ),
    member(
        "function replaced",
        "h = self.act(h)\nself.act = torch.relu if self.act is torch.tanh else torch.tanh",
        init="self.act = torch.tanh",
        word=r"\bact\b",
    ),
    member(
        "module's mode", "h = self.d(h)\nself.d.train(not self.d.training)", init="self.d = nn.Dropout(0.5)", word=r"\bd\b|mode"
    ),
    member("module's probability", "h = self.d(h)\nself.d.p = self.d.p / 2", init="self.d = nn.Dropout(0.5)", word=r"\bp\b"),
    member(
        "submodules taken in turn",
        "h = self.now(h)\nself.now = self.b if self.now is self.a else self.a",
        init="self.now = self.a",
        word=r"\bnow\b|submodule",
    ),
    member(
        "size of a tensor",
        "h = h * self.s.shape[0]\nself.s = torch.cat([self.s, self.s[:1]])",
        init="self.s = torch.zeros(1)",
        word=r"\bs\b",
        planned_from=None,
    ),
]
"""What is no tensor and changes from call to call: refused by name, or run as it is in a submodule."""


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", TENSORS, ids=ids(TENSORS))
def test_tensors_are_carried(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled(TENSORS))
def test_tensors_are_carried_in_a_submodule(of):
    check(inside(of))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", LATE, ids=ids(LATE))
@pytest.mark.parametrize("warm", [0, 2])
def test_state_that_the_first_calls_make(of, warm):
    """After real first calls it is as any other; before them, the steady state is planned and the first calls run unplanned."""
    steps = tuple(Step() for _ in range(5))
    late = member(of.name, allowed=GUARDED if warm == 0 else frozenset({"same"}))
    program = of.program.within(steps=steps, warm=warm)
    check(type(late)(program, late.allowed, planned_from=2))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", ELSEWHERE, ids=ids(ELSEWHERE))
def test_tensors_in_other_places_are_carried_or_refused(of):
    allowed = ANY if of.name in ("gradients flow on", "growing list") else REFUSABLE
    check(type(of)(of.program, allowed, of.planned_from if allowed is REFUSABLE else None))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", NUMBERS, ids=ids(NUMBERS))
def test_what_is_no_tensor_is_refused_by_name(of):
    check(type(of)(of.program, REFUSABLE, of.planned_from, word=of.word))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", sampled(NUMBERS))
def test_what_is_no_tensor_runs_as_it_is_in_a_submodule(of):
    check(inside(type(of)(of.program, ANY, None, word=of.word)))


def test_eager_shows_nothing_against_itself():
    check_against_itself([*TENSORS, *LATE, *ELSEWHERE, *NUMBERS])
