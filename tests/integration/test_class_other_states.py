"""Python state that some calls find and others do not: a first call's, and what the training loop resets or detaches.

Each is planned as the call that it is: the same bits, the same state afterwards, within the budget.
"""

import copy
import pickle
import time
import warnings

import pytest
import torch
from torch import nn

from planner import CaptureError, MismatchWarning, plan, profile, verify
from planner.profiler.memory import logical_peak
from planner.tracer.host.preserve import plain_tensors
from tests.support.members import GUARDED, check, ids, inside, member
from tests.support.source import Step

K = "torch.full((8,), 2.0)"
FIRST = "if {0} is None:\n    {0} = {1}\n"
NODE = "class Node:\n    def __init__(self):\n        self.k = None\n"

FILLED = [
    member("tensor", FIRST.format("self.k", K) + "h = h * self.k", init="self.k = None", measured=True),
    member("tensor that is missing", f"if not hasattr(self, 'k'):\n    self.k = {K}\nh = h * self.k", measured=True),
    member("tensor of an object", FIRST.format("self.n.k", K) + "h = h * self.n.k", head=NODE, init="self.n = Node()"),
    member("list", FIRST.format("self.k", f"[{K}, 1, 'a']") + "h = h * self.k[0]", init="self.k = None", measured=True),
    member("plain list", FIRST.format("self.k", "[*x.shape]") + "h = h * self.k[0]", init="self.k = None"),
    member("tuple", FIRST.format("self.k", f"({K}, None)") + "h = h * self.k[0]", init="self.k = None"),
    member("dict", FIRST.format("self.k", f"{{'a': {{1: {K}}}}}") + "h = h * self.k['a'][1]", init="self.k = None"),
    member(
        "dict item", f"if 'a' not in self.k:\n    self.k['a'] = {K}\nh = h * self.k['a']", init="self.k = {}", measured=True
    ),
    member("list item", FIRST.format("self.k[1]", K) + "h = h * self.k[1]", init="self.k = [0, None]"),
    member("empty list", f"if not self.k:\n    self.k.append({K})\nh = h * self.k[0]", init="self.k = []"),
    member(
        "empty list that grows by pairs",
        f"if not self.k:\n    self.k.append(({K}, 1))\nh = h * self.k[0][0]",
        init="self.k = []",
    ),
    member("buffer", FIRST.format("self.k", K) + "h = h * self.k", init="self.register_buffer('k', None)", measured=True),
    member(
        "buffer that is not saved",
        FIRST.format("self.k", K) + "h = h * self.k",
        init="self.register_buffer('k', None, persistent=False)",
    ),
    member("global variable", "global SEEN\n" + FIRST.format("SEEN", K) + "h = h * SEEN", head="SEEN = None"),
    member(
        "another tensor",
        "if len(self.k) == 0:\n    self.k = h.detach().mean(0)\nh = h * self.k",
        init="self.k = torch.zeros(0)",
    ),
    member("activation", FIRST.format("self.k", "h.detach() * 2") + "h = h * self.k", init="self.k = None", measured=True),
    member("a view", FIRST.format("self.k", "torch.arange(16.0).view(2, 8)[1]") + "h = h * self.k", init="self.k = None"),
    member("random numbers", FIRST.format("self.k", "torch.rand(8)") + "h = F.dropout(h * self.k, 0.5)", init="self.k = None"),
    member(
        "a first mean that moves on",
        "self.k = h.detach().mean(0) if self.k is None else self.k * 0.9 + h.detach().mean(0) * 0.1\nh = h - self.k",
        init="self.k = None",
        measured=True,
    ),
    member(
        "two that depend on each other",
        "if not self.is_ready:\n    self.k = h.detach().mean(0)\n    self.q = self.k * 2\n    self.is_ready = True\n"
        "h = h * self.k + self.q",
        init="self.k = self.q = None\nself.is_ready = False",
        measured=True,
    ),
    member(
        "other kernels",
        "if self.mode is None:\n    self.mode = 'double'\n    h = h + 1\nh = h * 2 if self.mode == 'double' else h",
        init="self.mode = None",
        measured=True,
    ),
    member(
        "draws",
        "if self.mode is None:\n    self.mode = 'double'\n    torch.rand(2)\nh = F.dropout(h, 0.5)",
        init="self.mode = None",
    ),
    member(
        "saved for the backward",
        "if self.k is None:\n    self.k = torch.sigmoid(h.detach()).mean(0)\n    h = torch.exp(torch.tanh(h)) * torch.sin(h)\n"
        "h = torch.tanh(h) * self.k",
        init="self.k = None",
        measured=True,
    ),
]


@pytest.mark.one_in(10)
@pytest.mark.parametrize("of", FILLED, ids=ids(FILLED))
def test_the_first_call_runs_planned(of):
    check(of)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", FILLED[::4], ids=ids(FILLED[::4]))
def test_the_first_call_runs_planned_in_a_submodule(of):
    check(inside(of))


NOT_EXPRESSED = [
    member(
        "one list in two places",
        f"if self.k is None:\n    self.k = self.q = [{K}]\nh = h * self.k[0] + self.q[0]",
        init="self.k = self.q = None",
        allowed=GUARDED,
        planned_from=1,
    ),
    member(
        "list that is held elsewhere",
        "if self.k is None:\n    self.k = self.all[0]\nh = h * self.k[0]",
        init=f"self.k, self.all = None, [[{K}]]",
        allowed=GUARDED,
        planned_from=1,
    ),
    member(
        "new buffer",
        f"if not hasattr(self, 'k'):\n    self.register_buffer('k', {K})\nh = h * self.k",
        allowed=GUARDED,
        planned_from=1,
    ),
    member(
        "buffer that becomes another kind",
        f"if self.k is None:\n    self.register_buffer('k', {K}, persistent=False)\nh = h * self.k",
        init="self.register_buffer('k', None)",
        allowed=GUARDED,
        planned_from=1,
    ),
    member(
        "object",
        "if self.k is None:\n    self.k = Node()\n    self.k.k = " + K + "\nh = h * self.k.k",
        head=NODE,
        init="self.k = None",
        allowed=GUARDED,
        planned_from=1,
    ),
    member(
        "weight",
        "if not self.is_ready:\n    self.is_ready = True\n    self.b.weight.data = self.b.weight.data * 0.5",
        init="self.is_ready = False",
        allowed=GUARDED,
        planned_from=1,
    ),
]


@pytest.mark.parametrize("of", NOT_EXPRESSED, ids=ids(NOT_EXPRESSED))
def test_a_first_call_that_no_plan_can_express_runs_as_it_is(of):
    check(of)


POTENTIAL = "for _ in range(3):\n    self.v = torch.tanh(self.b(h) + self.v * 0.5)\nh = h + self.v"
RESET = "part.v = 0.0"
DETACH = "part.v = part.v.detach() if isinstance(part.v, torch.Tensor) else part.v"


def loop(before):
    return tuple(Step(before=before) for _ in range(4))


CARRIED = [
    member("reset by the loop", POTENTIAL, init="self.v = 0.0", steps=loop(RESET)),
    member("detached by the loop", POTENTIAL, init="self.v = 0.0", steps=loop(DETACH)),
    member(
        "reset and detached in turn",
        POTENTIAL,
        init="self.v = 0.0",
        steps=(Step(), Step(before=DETACH), Step(before=RESET), Step(before=DETACH)),
    ),
    member(
        "pair detached by the loop",
        "p, q = self.s\np = torch.tanh(self.b(h) + p)\nq = q * 0.5 + p\nself.s = (p, q)\nh = h + q",
        init="self.s = (torch.zeros(16, 8), torch.zeros(16, 8))",
        steps=loop("part.s = tuple(s.detach() for s in part.s)"),
    ),
    member(
        "hidden state of a dictionary",
        "s = self.s['h']\ns = torch.tanh(self.b(h) + (0 if s is None else s))\nself.s['h'] = s\nh = h * s",
        init="self.s = {'h': None}",
        steps=loop("part.s['h'] = None if part.s['h'] is None else part.s['h'].detach()"),
    ),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", CARRIED, ids=ids(CARRIED))
def test_state_that_the_loop_resets_or_detaches_is_planned(of):
    check(of)


KEPT_INPUT = [
    member("first input", "if self.k is None:\n    self.k = x\nh = h * self.k", init="self.k = None", measured=True),
    member("input before", "h = h if self.k is None else h * self.k\nself.k = x", init="self.k = None", measured=True),
    member("input of two calls ago", "h = h * self.q\nself.q, self.k = self.k, x", init="self.q = self.k = torch.ones(16, 8)"),
    member("inputs in a list", "self.q = [*self.q[-2:], x]\nh = h * self.q[0]", init="self.q = [torch.ones(16, 8)] * 3"),
    member("input before planning", "if self.k is None:\n    self.k = x\nh = h * self.k", init="self.k = None", warm=1),
    member("global input", "global K\nif K is None:\n    K = x\nh = h * K", head="K = None"),
]


@pytest.mark.parametrize("of", KEPT_INPUT, ids=ids(KEPT_INPUT))
def test_an_input_that_an_earlier_call_left_is_no_input(of):
    check(of)


class Cached(nn.Module):
    """Keeps a mask of ones from its first call on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)
        self.mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(x.shape)
        return self.b(torch.tanh(self.a(x)).exp() * self.mask)


def planned_model(model, **options):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    return plan(model, 1.0, (x,), costs="estimate", progress=False, **options), x


def test_the_first_calls_plan_says_so():
    planned, x = planned_model(Cached())
    (first,) = planned.alternatives
    assert "for        first calls: Python state is as it was when this was planned" in str(planned)
    assert planned.plan.provenance.call == ""
    assert first.plan.measured_bytes <= first.plan.budget_bytes == planned.plan.budget_bytes
    planned(x).sum().backward()
    assert (first.num_runs, planned.num_runs, planned.num_unplanned_calls) == (1, 0, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"])
def test_copies_run_their_first_call_planned(copied):
    planned, x = planned_model(Cached())
    other = copied(planned)
    out = other(x)
    assert other.num_unplanned_calls == 0
    assert torch.equal(other.original.mask, torch.ones(16, 8)) and planned.original.mask is None
    assert torch.equal(out, planned.original(x))


def test_planning_leaves_the_first_call_to_the_model():
    model = Cached()
    planned, _ = planned_model(model)
    assert model.mask is None and planned.alternatives


def test_a_first_call_that_needs_more_than_the_budget_runs_unplanned_with_a_warning(caplog):
    class Large(Cached):
        def forward(self, x):
            if self.mask is None:
                wide = torch.exp(x.repeat(1, 4000))
                self.mask = torch.sin(wide).sum(1, keepdim=True)
            return self.b(torch.tanh(self.a(x)).exp() * self.mask)

    with caplog.at_level("INFO", "planner"):
        planned, x = planned_model(Large())
    assert not planned.alternatives and "when this was planned: Raise the budget to" in caplog.text
    with pytest.warns(MismatchWarning, match="mask"):
        planned(x)


@pytest.mark.parametrize("state", ["first", "detached", "carried"])
def test_another_backward_of_each_state_is_exact(state):
    """The loop adds the state itself to its loss, and reads gradients in another layout than planned."""

    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.v = nn.Linear(8, 8), None

        def forward(self, x):
            self.v = torch.tanh(self.a(x) + (0.5 if self.v is None else self.v * 0.5))
            return self.v.exp()

    def step(model, called, x):
        if state == "carried":
            model.v = torch.ones(16, 8, requires_grad=True) * 1
        elif state == "detached":
            model.v = torch.ones(16, 8)
        out = called(x)
        (out.sum(1).square().mean() + model.v.sum()).backward()
        return [out.detach(), model.v.detach(), *(p.grad for p in model.parameters())]

    model = Carrying()
    twin = copy.deepcopy(model)
    planned, x = planned_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(model, planned, x)
    assert planned.num_unplanned_calls == 0
    assert all(map(torch.equal, found, step(twin, twin, x)))


def test_a_profiled_step_plans_other_states_too():
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    planned = profile(Cached(), (x,), costs="estimate", progress=False).plan(1.0)
    assert len(planned.alternatives) == 1


def carrying(**attributes):
    """A recurrent net whose state the loop detaches; `attributes` are set on it."""

    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.v = nn.Linear(8, 8), nn.Linear(8, 8), None
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, x):
            self.v = torch.tanh(self.a(x) + (0.5 if self.v is None else self.v * 0.5))
            if hasattr(self, "count"):
                self.count += 1
            return torch.tanh(torch.tanh(self.b(self.v)).exp().sin()).cos()

    return Carrying()


def test_planning_leaves_plain_tensors_that_the_forward_counts_in():
    model = carrying(count=torch.zeros(()))
    planned, _ = planned_model(model)
    assert model.count == 0 and model.v is None and len(planned.alternatives) == 2


def test_state_that_is_there_only_after_some_calls_is_planned():
    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.k, self.q = nn.Linear(8, 8), None, None

        def forward(self, x):
            h = torch.tanh(self.a(x))
            h = h + (0 if self.q is None else self.q)
            self.q, self.k = self.k, h
            return h.exp()

    model = Delayed()
    planned, _ = planned_model(model)
    assert model.k is model.q is None and len(planned.alternatives) == 2


def test_a_plan_of_a_step_that_was_profiled_under_autocast_has_no_first_call():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        step = profile(model, (x,), costs="estimate", progress=False)
    assert step.plan(1.0).alternatives == []


def test_the_audit_and_verify_know_a_buffer_that_the_first_call_fills():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("k", None)

        def forward(self, x):
            if self.k is None:
                self.k = torch.full((8,), 2.0)
            return torch.tanh(self.a(x)).exp() * self.k

    planned, x = planned_model(Filled())
    report = verify(planned, (x,))
    assert report.exact and not report.unplanned and planned.original.k is None


@pytest.mark.zoo
def test_compiled_steps_of_carried_state_are_checked():
    planned = plan(carrying(), "1MiB", (torch.randn(16, 8),), costs="estimate", progress=False, compile=True)
    for module in (planned, *planned.alternatives):
        assert module.plan.measured_bytes is not None, module.plan.check


def peak_of(model, step):
    """Bytes of everything that a step has alive at a time, what was there before included."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *plain_tensors(model))}
    return sum(held.values()) + logical_peak(step, torch.device("cpu"))


def test_every_kind_of_call_is_within_the_budget():
    torch.manual_seed(0)
    model, x = carrying(), torch.randn(512, 8)
    planned = plan(model, 0.85, (x,), costs="estimate", progress=False)
    assert len(planned.alternatives) == 2 and planned.plan.overhead > 0
    planned.audits = False

    def step():
        planned(x).sum().backward()

    for number in range(4):
        planned.zero_grad(set_to_none=True)
        if number > 0:
            model.v = model.v.detach()
        assert x.nbytes + peak_of(model, step) <= planned.plan.budget_bytes
    assert planned.num_unplanned_calls == 0


def test_two_attributes_that_hold_one_tensor_are_two_where_the_loop_replaces_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.p = self.q = torch.zeros(8)

        def forward(self, x):
            return torch.tanh(self.a(x) - self.q + self.p)

    model = Two()
    twin = copy.deepcopy(model)
    planned, x = planned_model(model)
    assert torch.equal(planned(x), twin(x)) and planned.num_unplanned_calls == 0
    model.q = twin.q = torch.ones(8)
    with pytest.warns(MismatchWarning, match="q is another tensor"):
        assert torch.equal(planned(x), twin(x))


@pytest.mark.parametrize("text", ["self.t[0].mul_(1.5)", "T.mul_(1.5)", "h = h + self.e(torch.arange(16))"])
def test_planning_carried_state_leaves_what_the_forward_writes_in_place(text):
    forward = f"{text}\nself.v = torch.tanh(h + self.v * 0.5)\nh = h + self.v"
    init = "self.t = [torch.ones(8)]\nself.v = 0.0\nself.e = nn.Embedding(16, 8, max_norm=0.1)"
    check(member(text, forward, init=init, head="T = torch.ones(8)", steps=loop(DETACH)))


RECURRENT = [
    member(
        f"{kind} whose state is {name} by the loop",
        f"y, self.s = self.{kind.lower()}(h, self.s)\nh = h + y",
        init=f"self.{kind.lower()} = nn.{kind}(8, 8)\nself.s = None",
        steps=tuple(Step(before=change) for change in changes),
    )
    for kind in ("LSTM", "GRU")
    for name, changes in {
        "detached": ["part.s = detached(part.s)"] * 4,
        "reset, then detached": ["part.s = None"] * 2 + ["part.s = detached(part.s)"] * 2,
    }.items()
]
TREE = """
def detached(s):
    if isinstance(s, torch.Tensor):
        return s.detach()
    return None if s is None else tuple(t.detach() for t in s)
"""


@pytest.mark.parametrize("of", [*RECURRENT[:2], *(pytest.param(of, marks=pytest.mark.zoo) for of in RECURRENT[2:])])
def test_state_that_is_handed_to_a_submodule_which_runs_as_it_is(of):
    check(type(of)(of.program.within(head=TREE)))


LISTS = [
    member(
        f"list of {n} states, {name}",
        "self.s = [torch.tanh(self.b(h) + s * 0.5) for s in self.s]\nh = h + sum(self.s)",
        init=f"self.s = [0.0] * {n}",
        steps=loop(change),
    )
    for n in (1, 3)
    for name, change in {
        "reset": f"part.s = [0.0] * {n}",
        "detached": "part.s = [s.detach() if isinstance(s, torch.Tensor) else s for s in part.s]",
    }.items()
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", LISTS, ids=ids(LISTS))
def test_lists_of_states(of):
    check(of)


FIRST_EMPTY = "h = h - sum(self.v)\n{}"
OTHER_CONTENT = [
    member(
        f"{name}, first with {found}",
        FIRST_EMPTY.format(text),
        init="self.v = []",
        steps=(Step(before=f"part.v[:] = {found}"), *loop("")),
        planned_from=2,
        allowed=GUARDED,
    )
    for name, text in {
        "replaced": "self.v[:] = [h.detach().mean(0)]",
        "appended": "self.v.append(h.detach().mean(0))\ndel self.v[:-1]",
    }.items()
    for found in ("[1.0]", "[torch.ones(8)]", "[torch.ones(8, dtype=torch.half)]", "[torch.ones(8)] * 2")
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", OTHER_CONTENT, ids=ids(OTHER_CONTENT))
def test_a_first_call_compares_the_list_that_it_fills(of):
    check(of, audit=False)


class Second(nn.Module):
    """Its first call makes a leaf that gets gradients, stores a clock, adds a submodule: `kind` says which."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.kind, self.k = nn.Linear(8, 8), kind, None

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.k is None:
            self.k = {"leaf": lambda: torch.ones(8, requires_grad=True), "clock": time.perf_counter_ns}[self.kind]()
        return h * self.k if self.kind == "leaf" else h * (1 if self.k else 2)


def test_a_leaf_that_the_first_call_makes_is_the_models_own():
    planned, x = planned_model(Second("leaf"))
    with pytest.warns(MismatchWarning, match="k is None"):
        planned(x).sum().backward()
    leaf = planned.original.k
    assert leaf.is_leaf and leaf.grad is not None and planned.mismatch((x,), {}) is None


def test_a_clock_that_the_first_call_reads_is_not_planned():
    start = time.perf_counter_ns()
    with pytest.warns(UserWarning, match="does not recognize its own example call: k is"):
        planned, x = planned_model(Second("clock"))
    end = time.perf_counter_ns()
    with pytest.warns(MismatchWarning, match="k is None"):
        planned(x)
    assert not start <= planned.original.k <= end


def test_a_submodule_that_the_first_call_adds_is_refused_by_name():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.t = nn.Linear(8, 8), None

        def forward(self, x):
            if self.t is None:
                self.t = copy.deepcopy(self.a)
            return torch.tanh(self.t(x))

    with pytest.raises(CaptureError, match=r"adds, removes or replaces the submodule t: run the model once before planning"):
        planned_model(Grows())


@pytest.mark.parametrize("rows", [16, 4])
def test_another_backward_where_states_share_memory(rows):
    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.v, self.w = nn.Linear(8, 8), None, None

        def forward(self, x):
            h = torch.tanh(self.a(x))
            h = h if self.v is None else torch.tanh(h + self.v * self.w.mean())
            self.v = h * 2
            self.w = self.v if rows == 16 else self.v[:rows]
            return h.exp()

    model = Sharing()
    twin = copy.deepcopy(model)
    planned, x = planned_model(model)
    for _ in range(3):
        outs = [called(x) for called in (planned, twin)]
        for held, out in zip((model, twin), outs, strict=True):
            held.zero_grad()
            out.sum().backward()
            held.v, held.w = held.v.detach(), held.w.detach()
        assert torch.equal(*outs) and torch.equal(model.a.weight.grad, twin.a.weight.grad)


def test_other_layouts_are_within_a_fraction_in_every_state():
    torch.manual_seed(0)
    model, x = carrying(), torch.randn(16, 8)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    for number in range(3):
        if number:
            model.v = model.v.detach()
        out = planned(x)
        out.backward(torch.ones(8, 16).t())
    assert planned.num_unplanned_calls == 0


def test_the_example_call_may_be_in_python_state():
    x = torch.randn(16, 8)

    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.k, self.q = nn.Linear(8, 8), x, None

        def forward(self, x):
            self.q, self.k = self.k, x
            return torch.tanh(self.a(x))

    planned = plan(Moves(), 1.0, (x,), costs="estimate", progress=False)
    assert planned.plan.measured_bytes is not None


def test_an_input_that_python_state_shares_memory_with_is_a_mismatch_where_the_forward_writes():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.k = nn.Linear(8, 8), torch.zeros(16, 8)

        def forward(self, x):
            self.k.mul_(0.5)
            h = torch.tanh(self.a(x)) + self.k
            self.k = x
            return h

    planned, x = planned_model(Writes())
    planned(x)
    with pytest.warns(MismatchWarning, match="shares its memory with an input"):
        planned(x)
