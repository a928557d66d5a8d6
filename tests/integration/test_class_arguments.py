"""Lists and dictionaries among the arguments that the forward writes into: the same content, in the caller's own containers."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

from planner import CaptureError, ExportError, MismatchWarning, export_source, plan, verify
from tests.support.members import ANY, GUARDED, check, ids, member
from tests.support.source import Step

DICTIONARY = "({'x': torch.randn(16, 8), 'mask': torch.ones(16, 1), 'sizes': [3, 4]},)"
LIST = "([torch.randn(16, 8), torch.ones(16, 1)],)"


def of_dictionary(name, forward, **more):
    out = more.pop("out", "self.c(torch.tanh(self.b(torch.sigmoid(h) * 2)))")
    given = more.pop("given", DICTIONARY)
    return member(name, forward, signature="self, f", first="h = self.a(f['x'])", given=given, out=out, **more)


def of_list(name, forward, **more):
    return member(name, forward, signature="self, f", first="h = self.a(f[0])", given=LIST, **more)


WRITTEN = [
    of_dictionary("a key added", "f['h'] = h"),
    of_dictionary("keys added", "f.update({'h': h, 'n': 3, 'more': (h.mean(), [h, 'text'])})"),
    of_dictionary("a key replaced", "h = torch.tanh(h)\nf['x'] = h"),
    of_dictionary("a key taken out", "h = h * f.pop('mask')"),
    of_dictionary("a key replaced, one taken out, one added", "h = h * f.pop('mask')\nf['x'] = h\nf['last'] = h.mean()"),
    of_dictionary("a flag", "f['seen'] = True"),
    of_dictionary("a key set to an input", "f['again'] = f['x']"),
    of_dictionary("a key set to a weight", "f['weight'] = self.b.weight"),
    of_dictionary("detached", "f['h'] = h.detach()"),
    of_dictionary("a list in it", "f['sizes'].append(5)\nf['sizes'][0] = h"),
    of_dictionary("a list taken out after it was written", "f['sizes'].append(h)\nf['kept'] = len(f.pop('sizes'))"),
    of_dictionary("in place, and a key", "f['mask'].mul_(0.5)\nf['h'] = h"),
    of_dictionary("returned", "f['h'] = torch.tanh(self.b(h))", out="f"),
    of_dictionary("returned in a tuple", "f['h'] = torch.tanh(self.b(h)).detach()", out="(h.mean(), f)"),
    of_dictionary("a list in it returned", "h = torch.tanh(self.b(h))", out="(h, f['sizes'])"),
    of_dictionary(
        "an ordered dictionary",
        "f['h'] = h",
        given="(collections.OrderedDict(x=torch.randn(16, 8)),)",
    ),
    of_dictionary(
        "a defaultdict", "f['seen'].append(h)", given="(collections.defaultdict(list, x=torch.randn(16, 8), seen=[]),)"
    ),
    of_dictionary("a list popped and returned", "s = f.pop('sizes')", out="(h.mean(), s)"),
    of_dictionary("a list replaced and returned", "s = f['sizes']\nf['sizes'] = []", out="(h.mean(), s)"),
    of_dictionary(
        "returned in a named tuple",
        "f['h'] = h.detach()",
        out="Out(h.mean(), f)",
        head="Out = collections.namedtuple('Out', ['loss', 'features'])",
    ),
    of_dictionary(
        "kept on a module that counts", "self.n += 1\nself.last = (f, f['sizes'])", init="self.n, self.last = 0, None"
    ),
    of_dictionary("kept on the module", "f['h'] = h.detach()\nself.last = [f, f['sizes']]", init="self.last = None"),
    of_dictionary(
        "a carried tensor before it is replaced",
        "f['old'] = self.s\nself.s = h.detach().mean(0)\nh = h + self.s",
        init="self.s = torch.zeros(8)",
    ),
    of_dictionary("a table that no kernel reads", "f['table'] = self.t", init="self.t = torch.arange(3)"),
    of_dictionary("everything taken out", "f.clear()", measured=True),
    of_list("an item replaced", "f[1] = torch.tanh(h)"),
    of_list("appended", "f.append(h)"),
    of_list("emptied", "f.clear()"),
    of_list("popped", "h = h * f.pop()"),
    of_list("inserted", "f.insert(0, h)"),
    member(
        "a deque",
        "f.appendleft(h)",
        signature="self, f",
        first="h = self.a(f[0])",
        given="(collections.deque([torch.randn(16, 8), 1], maxlen=3),)",
    ),
    member(
        "several dictionaries",
        "for f in fs:\n    f['h'] = torch.tanh(self.b(f['x']))\n    h = h + f['h']",
        signature="self, fs",
        first="h = self.a(fs[0]['x'])",
        given="([{'x': torch.randn(16, 8)}, {'x': torch.randn(16, 8)}],)",
    ),
]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", WRITTEN, ids=ids(WRITTEN))
def test_what_the_forward_writes_into_its_arguments_is_there(of):
    check(of)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("kind", ["in_flight", "accumulate", "twice", "evaluated", "partial", "copied", "interrupted"])
@pytest.mark.parametrize("of", WRITTEN[4::4], ids=ids(WRITTEN[4::4]))
def test_in_every_kind_of_step(of, kind):
    check(member(of.name, **fields(of.program), steps=(Step(), Step(kind), Step()), planned_to=1, allowed=GUARDED))


def fields(program):
    return {name: getattr(program, name) for name in ("forward", "signature", "first", "given", "out", "init", "head")}


OTHER = [
    of_dictionary("one list in two places", "l = [h]\nf['p'] = l\nf['q'] = l", allowed=ANY),
    of_dictionary("a list that is returned, too", "f['l'] = [3]", out="(h.mean(), f['l'])", allowed=ANY),
    of_dictionary("a new leaf", "f['z'] = torch.zeros(3, requires_grad=True)", allowed=ANY),
    of_dictionary("one container in two places", "f['h'] = f['sizes']", allowed=ANY),
    of_dictionary("itself", "f['self'] = f", allowed=ANY),
    of_dictionary("an object", "f['o'] = types.SimpleNamespace(h=h)", allowed=ANY),
    of_dictionary("keys in another order", "f['x'] = f.pop('x')", allowed=ANY),
    of_dictionary("another order and a new key", "h = f.pop('x') * 2\nf['x'] = h", allowed=ANY),
    of_dictionary("a count", "self.n += 1\nf['n'] = self.n", init="self.n = 0", allowed=ANY),
    of_dictionary("a random number", "f['n'] = random.random()", allowed=ANY),
    of_dictionary("a clock", "import time\nf['n'] = time.perf_counter()", allowed=ANY, ignored="'n'|\\bn\\b"),
    of_dictionary(
        "kept on a module that counts", "self.n += 1\nself.last = (f, f['sizes'])", init="self.n, self.last = 0, None"
    ),
    of_dictionary("kept on the module", "self.last = f\nf['h'] = h", init="self.last = None", allowed=ANY),
    of_dictionary("an array", "f['sizes'] = np.ones(3)", allowed=ANY),
    member(
        "written by a first call",
        "if self.k is None:\n    self.k = 1\n    f['first'] = h",
        init="self.k = None",
        signature="self, f",
        first="h = self.a(f['x'])",
        given=DICTIONARY,
        allowed=ANY,
        planned_from=None,
    ),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", OTHER, ids=ids(OTHER))
def test_what_no_plan_can_write_is_left_to_the_model(of):
    check(of if of.planned_from is None else member(of.name, **fields(of.program), **rest(of)))


def rest(of):
    return {"ignored": of.program.ignored, "allowed": of.allowed, "planned_from": None}


class Writes(nn.Module):
    """As modules of sentence-transformers: takes a dictionary of features, adds to it and returns it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, features):
        h = torch.tanh(self.a(features["x"]))
        features.update(tokens=h, sentence=torch.tanh(self.b(h)).mean(0))
        return features


def features(rows=64):
    return {"x": torch.randn(rows, 8)}


def test_the_callers_own_dictionary_is_returned_and_holds_what_trains():
    model, seen = Writes(), features()
    plain = copy.deepcopy(model)
    planned = plan(model, 1.0, (seen,), progress=False)
    assert [*seen] == ["x"]  # planning wrote nothing
    for _ in range(2):
        ours = features()
        theirs = dict(ours)
        assert planned(ours) is ours and plain(theirs) is theirs and [*ours] == [*theirs]
        (ours["sentence"].sum() + ours["tokens"].mean()).backward()
        (theirs["sentence"].sum() + theirs["tokens"].mean()).backward()
        for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, expected.grad)
            mine.grad = expected.grad = None
    assert planned.num_planned_calls == 2 and planned.stats().audits == 1


def test_verify_copies_and_pickles_of_a_plan_that_writes(tmp_path):
    model = Writes()
    planned = plan(model, 1.0, (features(),), progress=False)
    given = features()
    report = verify(planned, (given,), rounds=1)
    assert not report.differences and not report.unplanned and [*given] == ["x"]
    for other in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        given = features()
        assert other(given) is given and [*given] == ["x", "tokens", "sentence"]
        assert other.num_planned_calls == 1
    with pytest.raises(ExportError, match=r"leaves something in args\[0\]"):
        export_source(planned, tmp_path / "step.py")


def test_one_dictionary_given_twice_runs_unplanned():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = Writes()

        def forward(self, pair):
            return [self.of(each)["sentence"] for each in pair]

    model, one = Pair(), features()
    with pytest.raises(CaptureError, match="stands in two places"):
        plan(model, 1.0, ([one, one],), progress=False, opaque=[])
    planned = plan(model, 1.0, ([features(), features()],), progress=False)
    with pytest.warns(MismatchWarning, match="two places"):
        planned([one, one])
    assert planned.mismatch(([features(), features()],), {}) is None


def test_a_dictionary_that_python_state_holds_too_runs_unplanned():
    class Remembers(Writes):
        def __init__(self):
            super().__init__()
            self.memory = {"x": torch.randn(64, 8), "sentence": torch.zeros(8)}

        def forward(self, given):
            out = super().forward(given)
            return out["sentence"] + self.memory["sentence"]

    model = Remembers()
    plain = copy.deepcopy(model)
    planned = plan(model, 1.0, ({"x": torch.randn(64, 8), "sentence": torch.zeros(8)},), progress=False)
    with pytest.warns(MismatchWarning, match="two places"):
        ours = planned(model.memory)
    assert torch.equal(ours, plain(plain.memory))
    with pytest.raises(CaptureError, match="stands in two places"):
        plan(plain, 1.0, (plain.memory,), progress=False, opaque=[])


def test_the_callers_own_containers_are_kept_and_returned():
    class Keeps(Writes):
        def forward(self, given):
            self.last = given
            out = super().forward(given)
            return Given(out["sentence"], out)

    planned, given = plan(Keeps(), 1.0, (features(),), progress=False, loss=0), features()
    out = planned(given)
    assert planned.num_planned_calls == 1 and out.features is given and planned.original.last is given


Given = namedtuple("Given", ["loss", "features"])


def test_a_dictionary_of_keywords_is_written():
    class Keywords(Writes):
        def forward(self, *, features):
            return super().forward(features)

    planned, given = plan(Keywords(), 1.0, (), {"features": features()}, progress=False), features()
    assert planned(features=given) is given and "sentence" in given and planned.num_planned_calls == 1


def test_an_audit_leaves_the_arguments_alone_and_compares_them():
    planned = plan(Writes(), 1.0, (features(),), progress=False)
    planned(features())
    given = features()
    held = given["x"].clone()
    planned(given)
    assert planned.num_audits == 1 and torch.equal(given["x"], held) and [*given] == ["x", "tokens", "sentence"]


@pytest.mark.parametrize("of", WRITTEN[:3], ids=ids(WRITTEN[:3]))
def test_a_submodule_that_writes_into_what_it_is_given(of):
    program = of.program
    check(
        member(
            of.name,
            f"f = {{'x': h}}\n{program.forward}\nh = h + f['x']",
            init=program.init,
        )
    )


class Sized(nn.Module):
    """Takes a torch.Size, by its methods, and returns one, in a tuple or alone."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, size, also=()):
        h = torch.tanh(self.up(x)) * size.numel()
        return h.sum(), h.shape, {"size": size, "also": also}


def test_a_torch_size_stays_one():
    model, x, size = Sized(), torch.randn(16, 8), torch.Size([2, 3])
    planned = plan(model, 1.0, (x, size), {"also": (size, 1)}, loss=0, progress=False)
    loss, shape, rest = planned(x, size, also=(size, 1))
    loss.backward()
    assert planned.num_planned_calls == 1
    assert all(type(found) is torch.Size for found in (shape, rest["size"], rest["also"][0])) and shape.numel() == 128
    with pytest.warns(MismatchWarning, match=r"Size\(\[3, 3\]\)|size"):
        other = planned(x, torch.Size([3, 3]), also=(size, 1))
    assert torch.equal(other[0], model(x, torch.Size([3, 3]), also=(size, 1))[0])
