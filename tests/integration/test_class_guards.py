"""Guards that meet the unexpected, traces of planning, threads, copies, and installs."""

import copy
import gc
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from planner import CaptureError, MismatchWarning, install, plan, uninstall
from tests.support import observe, world
from tests.support.harness import planned_near
from tests.support.itself import check_against_itself
from tests.support.members import ANY, GUARDED, check, ids, inside, member
from tests.support.source import Program, Step
from tests.support.training import assert_same, trajectory

HEAD = """
class Refuses:
    def __eq__(self, other):
        raise RuntimeError('cannot be compared')
    __hash__ = None
    k = 5
class Vague:
    def __bool__(self):
        raise ValueError('ambiguous')
    k = 5
class Silent:
    def __getattr__(self, name):
        raise RuntimeError('no ' + name)
class MyDict(dict): pass
class Halved(nn.Linear):
    weight = property(lambda s: s._parameters['weight'] / 2)
class Doubled(nn.Module):
    def forward(self, w):
        return w * 2
import torch.nn.utils.parametrize, torch.nn.utils.prune
"""
READ = "k = getattr(self.v, 'k', 2) if not isinstance(self.v, dict) else self.v['k']\nh = h * k"
CHANGES = {
    "an array": "part.v = np.ones(3)",
    "a tensor": "part.v = torch.ones(3)",
    "an object that cannot be compared": "part.v = Refuses()",
    "an object without a truth value": "part.v = Vague()",
    "a dict": "part.v = {'k': 5}",
    "a dict subclass": "part.v = MyDict(k=5)",
    "a module": "part.v = nn.Linear(2, 2)",
    "a parameter": "part.v = nn.Parameter(torch.ones(2))",
    "a class": "part.v = Vague",
    "nothing": "del part.v\ntype(part).v = 3",
    "a very long text": "part.v = 'x' * 100000",
    "a recursive list": "part.v = []\npart.v.append(part.v)",
    "the model itself": "object.__setattr__(part, 'v', part)",
    "a lock": "import threading\npart.v = threading.Lock()",
    "an iterator": "part.v = iter([1])",
    "a mock": "from unittest import mock\npart.v = mock.MagicMock(k=5)",
}
WEIGHTS = {
    "parametrized": "nn.utils.parametrize.register_parametrization(part.b, 'weight', Doubled())",
    "weight_norm": "nn.utils.parametrizations.weight_norm(part.b)",
    "pruned": "nn.utils.prune.l1_unstructured(part.b, 'weight', amount=0.5)",
    "no bias": "part.b.bias = None",
    "a plain weight": "w = part.b.weight.detach()\ndel part.b.weight\npart.b.weight = w",
    "a view as the weight": "w = part.b.weight\ndel part.b.weight\npart.b.weight = w.view(8, 8)",
    "a weight as a property": "part.b.__class__ = Halved",
    "an empty weight": "part.b = nn.Linear(8, 0)\npart.c = nn.Linear(0, 8)",
    "a meta weight": "part.unused = nn.Linear(8, 8, device='meta')",
    "a sparse buffer": "part.register_buffer('s', torch.eye(3).to_sparse())",
    "a dtype": "part.b.bias.data = part.b.bias.data",
    "an identity": "part.b = nn.Identity()",
    "a missing layer": "del part.b",
}


def unexpected():
    made = []
    for name, change in {**CHANGES, **WEIGHTS}.items():
        steps = (Step(), Step(before=change), Step())
        made.append(member(name, READ, init="self.v = None", head=HEAD, allowed=GUARDED, steps=steps, planned_to=1))
    return made


ARGUMENTS = {
    "array": ("np.ones(8, 'f')", "h = h * torch.as_tensor(v)", "np.full(8, 3, 'f')"),
    "dict subclass": ("MyDict(k=2.0)", "h = h * v['k']", "MyDict(k=3.0)"),
    "dataclass": ("Point()", "h = h * v.x", "Point(3.0)"),
    "namespace": ("types.SimpleNamespace(x=2.0)", "h = h * v.x", "types.SimpleNamespace(x=3.0)"),
    "int": ("1", "h = h * torch.full((1,), v)", "1.0"),
    "bool": ("1", "h = h * torch.full((1,), v)", "True"),
    "function": ("torch.tanh", "h = v(h)", "torch.relu"),
    "lambda": ("(lambda h: h * 2)", "h = v(h)", "(lambda h: h * 3)"),
    "module": ("nn.Dropout(0.5)", "h = v(h)", "nn.Dropout(0.9)"),
    "list": ("[1.0, 2.0]", "h = h * v[1]", "[1.0, 3.0]"),
    "nested": ("{'a': [1.0, (2.0,)]}", "h = h * v['a'][1][0]", "{'a': [1.0, (3.0,)]}"),
    "set": ("{1, 2}", "h = h * len(v)", "{1, 2, 3}"),
    "text": ("'ab'", "h = h * len(v)", "'abc'"),
    "None": ("None", "h = h if v is None else h * v", "3.0"),
    "not a number": ("float('nan')", "h = h * (v != v)", "1.0"),
    "enum": ("Mode.LOW", "h = h * v.value", "Mode.HIGH"),
    "a generator": (
        "torch.Generator().manual_seed(1)",
        "h = h * torch.rand(8, generator=v)",
        "torch.Generator().manual_seed(2)",
    ),
    "incomparable": ("Refuses()", "h = h * v.k", "Refuses()"),
    "sparse": ("torch.ones(16, 8)", "h = h + (v.to_dense() if v.is_sparse else v)", "torch.eye(16, 8).to_sparse()"),
}
ARGUMENT_HEAD = f"""{HEAD}
STEP = [0]
@dataclasses.dataclass
class Point:
    x: float = 2.0
class Mode(enum.Enum):
    LOW = 2
    HIGH = 5
"""


def arguments():
    made = []
    for name, (planned, text, other) in ARGUMENTS.items():
        given = f"(torch.randn(16, 8), {planned} if STEP[0] == 0 else {other})"
        steps = (Step(), Step(before="STEP[0] = 1"), Step(before="STEP[0] = 0"))
        made.append(
            member(
                name, text, signature="self, x, v", head=ARGUMENT_HEAD, given=given, steps=steps, allowed=ANY, planned_from=None
            )
        )
    return made


@pytest.mark.one_in(6)
@pytest.mark.parametrize("of", unexpected(), ids=ids(unexpected()))
def test_a_guard_that_raises_is_a_mismatch(of):
    check(of)


@pytest.mark.parametrize("of", unexpected()[1::4], ids=ids(unexpected()[1::4]))
def test_a_guard_that_raises_in_a_submodule(of):
    check(inside(of))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", arguments(), ids=ids(arguments()))
def test_arguments_of_every_type(of):
    check(of)


RAISES = {
    "an error of the model's": ("raise KeyError('mine')", CaptureError),
    "an error late in the forward": ("h = torch.tanh(h)\nself.n = [h]\nraise ValueError('mine')", CaptureError),
    "an interrupt": ("raise KeyboardInterrupt", KeyboardInterrupt),
    "an exit": ("raise SystemExit(3)", SystemExit),
    "a shape that depends on data": ("h = h[h[:, 0] > 0]\nself.n = h", CaptureError),
    "random": ("h = h * random.random()\nself.n = [h]", CaptureError),
}


def traced():
    """How many tensors of a trace are alive."""
    gc.collect()
    return sum(type(held).__name__ in ("FakeTensor", "FunctionalTensor") for held in gc.get_objects())


def left_by_planning(text, attempt):
    """Plans a program by `attempt`; asserts that its model, the process and the tensors of traces are as before."""
    home = Program("planned", text, init="self.n = []").load()

    def seen(model):
        return observe.state_of(model, "model", home.__name__, ids=True), world.switches(), world.generators()

    with world.kept():
        attempt(home.build(), home.inputs())  # torch keeps the random state of its latest trace
        model, args = home.build(), home.inputs()
        before, held = seen(model), traced()
        attempt(model, args)
        assert before == seen(model)
        assert traced() == held


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("text", "error"), RAISES.values(), ids=RAISES)
def test_a_failed_plan_leaves_no_trace(text, error):
    def fails(model, args):
        raised = None
        try:  # not pytest.raises, which keeps the frames of the error
            plan(model, 1.0, args, costs="estimate", progress=False)
        except (CaptureError, KeyboardInterrupt, SystemExit) as caught:
            raised = type(caught)
        assert raised is error

    left_by_planning(text, fails)


def test_a_plan_that_is_dropped_leaves_no_trace():
    def made(model, args):
        assert plan(model, 1.0, args, costs="estimate", progress=False).plan.graph.num_forward_ops > 0

    left_by_planning("h = h if h.sum() > 0 else -h\nself.n = h", made)


def block(width=12):
    return nn.Sequential(*[layer for i in range(6) for layer in (nn.Linear(width + i, width + i + 1), nn.GELU())])


def test_two_plans_in_two_threads():
    """Both succeed, and nothing of the process is left replaced."""
    model, x = block(), torch.randn(50, 12)
    before, failed, planned = world.switches(), [], []

    def work():
        try:
            planned.append(plan(model, 1.0, (x,), costs="estimate", progress=False))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(planned) == 4
    assert world.switches() == before
    expected = model(x)
    assert all(torch.equal(module(x), expected) for module in planned)


def test_training_while_another_thread_plans():
    """Eager training of another model goes on, and its bits are those of a quiet process."""
    model, other, x = block(), block(), torch.randn(50, 12)
    expected = other(x).detach()
    done, found = threading.Event(), []

    def work():
        while not done.is_set():
            found.append(torch.equal(other(x), expected))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            plan(model, 1.0, (x,), costs="estimate", progress=False)
    finally:
        done.set()
        thread.join()
    assert found and all(found)
    assert sys.getprofile() is None and threading.getprofile() is None


BETWEEN = {
    "attribute": "part.s = 5.0",
    "list": "part.l[0] = 5.0",
    "hook": "part.b.register_forward_hook(lambda m, a, o: o * 2)",
    "submodule": "part.b = nn.Linear(8, 8, bias=False)",
    "mode": "part.d.eval()",
    "probability": "part.d.p = 0.9",
    "bias": "part.b.bias = None",
    "weight's layout": "part.b.weight = nn.Parameter(part.b.weight.detach().t())",
    "frozen": "part.b.weight.requires_grad_(False)",
    "class": "part.b.__class__ = type('Other', (nn.Linear,), {'forward': lambda s, x: x * 2})",
    "global": "global G\nG = 5.0",
    "tensor": "part.t = torch.full((8,), 5.0)",
}


def installable(before):
    text = "h = self.d(h * self.s * self.l[0] * G * self.t)"
    init = "self.s, self.l, self.t, self.d = 2.0, [2.0], torch.full((8,), 2.0), nn.Dropout(0.2)"
    return Program("installed", text, init, "G = 2.0", steps=(Step(before=before),)).load()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("when", ["after install", "between plan and install"])
@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_a_change_before_the_first_installed_call_is_seen(change, when):
    results = []
    for installs in (False, True):
        with world.kept():
            home = installable(change)
            world.seed(1)
            model, (x,) = home.build(), home.inputs()
            module = planned_near(model, 0.9, (x,), {"effort": 0.3}) if installs else None
            if installs and when == "after install":
                install(model, module)
            home.before_0(model, model)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if installs and when != "after install":
                    install(model, module)
                world.seed(3)
                out = model(x)
                out.square().mean().backward()
            results.append([out.detach(), *(p.grad for _, p in sorted(model.named_parameters()))])
            told = [item for item in said if issubclass(item.category, MismatchWarning)]
            assert bool(told) == installs or change == BETWEEN["tensor"]  # which a plan may read
            uninstall(model)
    for eager, found in zip(*results, strict=True):
        assert (eager is None) == (found is None) and (eager is None or torch.equal(eager, found))


@pytest.mark.parametrize("how", ["of the planned module", "of an installed model"])
def test_a_copy_trains_planned_and_sees_its_own_settings(how):
    with world.kept():
        home = installable("part.s = 5.0")
        model, (x,) = home.build(), home.inputs()
        module = planned_near(model, 0.9, (x,), {})
        if how == "of an installed model":
            install(model, module)
        twin = copy.deepcopy(module if how == "of the planned module" else model)
        eager = copy.deepcopy(model)
        uninstall(eager)
        for holder in (twin, eager):
            world.seed(3)
            holder.zero_grad()
            holder(x).square().mean().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(twin.parameters(), eager.parameters(), strict=True))
        owner = twin.original if how == "of the planned module" else twin
        owner.s = eager.s = 5.0
        world.seed(4)
        with pytest.warns(MismatchWarning):
            found = twin(x)
        world.seed(4)
        assert torch.equal(found, eager(x))


def test_a_refusal_names_the_file_and_line_of_the_model():
    home = Program("fails", "h = h[h[:, 0] > 0]").load()
    with pytest.raises(CaptureError, match=r"program_\d+\.py:\d+"):
        plan(home.build(), 1.0, home.inputs(), costs="estimate", progress=False)


class Answering:
    """Answers to every name, as mocks and lazily made backends do, or raises an error of its own."""

    def __init__(self, how, value):
        self.how, self.value = how, value

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if self.how == "refuses":
            raise LookupError(f"{name} is not supported")
        return self if self.how == "itself" else self._raise

    def _raise(self, *args, **kwargs):
        raise LookupError("the operation is not supported")


class WithAnswering(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.backend, self.more = Answering(how, 2.0), [Answering(how, 3.0)]

    def forward(self, x):
        return self.layer(x).square().mean() * self.backend.value * self.more[0].value


@pytest.mark.parametrize("how", ["itself", "a function that raises", "refuses"])
def test_an_object_that_answers_to_every_name_is_compared_by_what_it_holds(how):
    torch.manual_seed(0)
    model, x = WithAnswering(how), torch.randn(3, 4)
    twin = copy.deepcopy(model)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert_same(trajectory(twin, (x,), {}), trajectory(planned, (x,), {}))
    model.more[0].value = twin.more[0].value = 5.0
    assert "is 5.0, planned for 3.0" in str(planned.mismatch((x,), {}))
    with pytest.warns(MismatchWarning, match=r"more\[0\]\.value"):
        assert torch.equal(planned(x), twin(x))


def test_eager_shows_nothing_against_itself():
    check_against_itself([*unexpected(), *arguments()])
