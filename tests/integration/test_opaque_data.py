"""Opaque modules whose kernels depend on the data: the budget holds for other batches of the kind, or a warning says more."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import CaptureError, PlannerError, plan, plan_units
from planner.profiler.memory import logical_peak
from planner.tracer.host.generators import Generators
from planner.tracer.opaque.measure import as_it_was
from planner.tracer.opaque.resample import resampled
from tests.support.training import assert_same


class Routed(nn.Module):
    """Each expert runs on the tokens that the router sends it; what arrives where is decided inside of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16 * (i + 1)), nn.GELU(), nn.Linear(16 * (i + 1), 16)) for i in range(3)
        )

    def forward(self, x):
        out, chosen = torch.zeros_like(x), self.gate(x).argmax(-1)
        for i, expert in enumerate(self.experts):
            token = (chosen == i).nonzero(as_tuple=True)[0]
            out = out.index_add(0, token, expert(x[token]))
        return out


class Selected(nn.Module):
    """Runs on the rows that a mask selects; how many they are depends on their contents."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x):
        mask = x[:, 0] > 0
        return x.masked_scatter(mask[:, None], self.body(x[mask]))


class Unique(nn.Module):
    """Embeds each distinct token once."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(64, 16), nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x):
        tokens, places = (x[:, 0].detach() * 8 + 32).long().clamp(0, 63).unique(return_inverse=True)
        return F.embedding(places, self.body(self.table(tokens))) + x


class Net(nn.Module):
    """Two opaque modules in a row, and a loss."""

    def __init__(self, core: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 4)
        self.cores = nn.ModuleList([core(), core()])

    def forward(self, x):
        x = self.before(x)
        for core in self.cores:
            x = x + torch.tanh(core(x))
        return self.after(x).square().mean()


def planned(core: type[nn.Module]):
    torch.manual_seed(0)
    module = plan(Net(core), 1.0, (torch.randn(96, 16),), progress=False, costs="estimate")
    assert module.plan.provenance.opaque == ("cores.0", "cores.1")
    return module


def peak_of(module, batch: torch.Tensor) -> int:
    """The measured peak of a step, with parameters and batch."""
    module.zero_grad(set_to_none=True)
    resident = sum(parameter.nbytes for parameter in module.parameters()) + batch.nbytes
    return logical_peak(lambda: module(batch).backward(), module.device) + resident


@pytest.mark.parametrize("core", [Routed, Selected])
def test_the_budget_holds_for_other_batches_of_the_kind(core):
    module = planned(core)
    peaks = [peak_of(module, torch.randn(96, 16)) for _ in range(12)]
    assert len({*peaks}) > 1
    assert max(peaks) <= module.plan.budget_bytes


@pytest.mark.parametrize("core", [Selected, Unique])
def test_a_batch_of_another_kind_that_saves_more_is_announced_once(core):
    module = planned(core)
    batch = torch.linspace(-4, 4, 96)[:, None].expand(96, 16).contiguous()
    with torch.no_grad():
        module.before.weight.copy_(torch.eye(16))
        module.before.bias.fill_(4.01 if core is Selected else 0.0)
    saves_more = r"cores\.\d, which runs as it is, saves .* at most .* may need .* more than its budget"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            module.zero_grad(set_to_none=True)
            module(batch).backward()
    calls = [str(warning.message).partition(",")[0] for warning in said]
    assert calls and len({*calls}) == len(calls)
    assert all(re.match(saves_more, str(warning.message)) for warning in said)


def test_rows_are_drawn_alike_from_arguments_that_have_the_same_ones():
    x, index = torch.arange(24.0).reshape(2, 3, 4), torch.arange(6.0).reshape(2, 3)
    other, offsets = torch.arange(5), torch.zeros(2, 3, 1).expand(2, 3, 4)
    drawn = resampled([x, index, other, offsets, x.transpose(0, 1).contiguous().transpose(0, 1)], 1)
    assert torch.equal(drawn[0][..., 0] / 4, drawn[1])
    assert len(drawn[1].unique()) < 6 and drawn[1].flatten().tolist() == sorted(drawn[1].flatten().tolist())
    assert drawn[2] is other and drawn[3] is offsets
    assert drawn[4].stride() == (4, 8, 1) and torch.equal(drawn[4], drawn[0])
    assert all(torch.equal(a, b) for a, b in zip(resampled([x], 1), drawn, strict=False))


def test_nothing_is_drawn_from_what_has_no_rows():
    scalar, single = torch.tensor(1.0), torch.randn(1, 4)
    assert resampled([scalar], 1)[0] is scalar
    assert resampled([single], 1)[0] is single
    assert resampled([], 1) == []


def test_integers_that_may_point_to_rows_are_left():
    x, parents, table = torch.randn(16, 4), torch.arange(16).clamp(min=1) - 1, torch.arange(32).reshape(16, 2) // 2
    kinds = torch.arange(32).reshape(16, 2) % 4
    drawn = resampled([x, parents, table, kinds], 1)
    assert drawn[1] is parents and drawn[2] is table
    assert not torch.equal(drawn[0], x) and not torch.equal(drawn[3], kinds)


class Momentum(nn.Module):
    """A teacher that the forward moves towards its weights, by kernels that count and by one that does not."""

    def __init__(self, how) -> None:
        super().__init__()
        self.own, self.teacher, self.how = nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False), how

    def forward(self, x):
        with torch.no_grad():
            for mine, slow in zip(self.own.parameters(), self.teacher.parameters(), strict=True):
                self.how(slow, mine)
        mask = x[:, 0] > 0
        return (x + self.teacher(x)).masked_scatter(mask[:, None], self.own(x[mask]))


HOWS = {
    "lerp_": lambda slow, mine: slow.lerp_(mine, 0.1),
    "data": lambda slow, mine: slow.data.mul_(0.9).add_(mine.data, alpha=0.1),
    "its own weight": lambda slow, mine: mine.data.mul_(0.99),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("planner", [plan, plan_units])
def test_weights_that_an_opaque_module_writes_are_as_before(how, planner):
    torch.manual_seed(0)
    model, x = Net(lambda: Momentum(HOWS[how])), torch.randn(96, 16)
    before = copy.deepcopy(model)
    try:
        planned = planner(model, 1.0, (x,), progress=False, costs="estimate", effort=0.3)
    except PlannerError:
        planned = None
    assert_same([*before.state_dict().values()], [*model.state_dict().values()])
    net = planned if planner is plan and planned is not None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            for each in (before, net):
                each.zero_grad(set_to_none=True)
                each(x).backward()
    assert_same([*before.state_dict().values()], [*model.state_dict().values()])
    grads = [[p.grad for p in each.parameters() if p.grad is not None] for each in (before, model)]
    assert_same(*grads)


class Holder:
    """An object, and a module's global variable, that hold an iterator."""

    steps = None


class Schedule(Selected):
    """Reads an iterator, which `place` puts somewhere; what it returns is how to read it."""

    def __init__(self, place) -> None:
        super().__init__()
        self.read = place(self, iter(range(1000)))

    def forward(self, x):
        self.now = self.read()
        return super().forward(x)


def in_object(module, steps):
    module.held = Holder()
    module.held.steps = steps
    return lambda: next(module.held.steps)


def in_attribute(module, steps):
    module.steps = steps
    return lambda: next(module.steps)


def in_list(module, steps):
    module.steps = {"k": [steps]}
    return lambda: next(module.steps["k"][0])


def in_tuple(module, steps):
    module.steps = (1, ([2], steps))
    return lambda: next(module.steps[1][1])


PLACES = {
    "attribute": in_attribute,
    "object": in_object,
    "list": in_list,
    "tuple": in_tuple,
    "closure": lambda module, steps: lambda: next(steps),
    "partial": lambda module, steps: functools.partial(next, steps),
}


AS_OPAQUE = ("cores.0", "cores.1")


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("place", "opaque"), [(place, opaque) for place in PLACES for opaque in (AS_OPAQUE, ())])
def test_an_iterator_stands_where_it_stood_after_planning(place, opaque):
    model, x = Net(lambda: Schedule(PLACES[place])), torch.randn(96, 16)
    with contextlib.suppress(CaptureError):  # a refusal leaves it, too
        plan(model, 1.0, (x,), opaque=opaque, progress=False, costs="estimate")
    model(x).backward()
    assert [core.now for core in model.cores] == [0, 0]


SWITCHES = {
    "dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "grad": (torch.is_grad_enabled, torch.set_grad_enabled, False),
    "threads": (torch.get_num_threads, torch.set_num_threads, torch.get_num_threads() + 1),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_run_that_fails_before_it_sets_a_switch_back_leaves_it(name):
    get, put, other = SWITCHES[name]
    before = get()
    with contextlib.suppress(ValueError), as_it_was(nn.Linear(1, 1)):
        put(other)
        assert get() != before
        raise ValueError("other rows")
    assert get() == before


def test_measuring_leaves_no_seed_for_a_device_that_is_not_in_use(monkeypatch):
    def refuse(seed):
        raise AssertionError("this seed is kept for CUDA")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    generators = Generators(torch.device("cpu"))
    with generators.preserved():
        generators.seed(5)
        assert torch.initial_seed() == 5
