"""Two captures of one step whose nodes are called otherwise are the same graph, and the plan of one is applied to the other."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planner import Plan, apply, plan, verify
from planner.batch import extrapolated
from planner.errors import PlanFileError
from planner.graph.structure import fingerprint, places, wiring
from planner.limits import Limits
from planner.results.sweep import Sweep
from planner.tracer.capture import capture
from planner.tracer.lower import lower
from tests.support.sweeps import sweep_of

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"costs": "estimate", "progress": False}


class Step(nn.Module):
    """Calls that no result depends on leave no node, but take names: what follows is called tanh_1 instead of tanh."""

    def __init__(self, unused=0, layers=3, factor=3.0, hidden=16):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.drop = nn.Linear(8, hidden), nn.Dropout(0.1)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.unused, self.factor = unused, factor

    def forward(self, x):
        for _ in range(self.unused):
            torch.tanh(x * 5).mul(2).sum()
        h = self.first(x)
        for layer in self.layers:
            h = self.drop(torch.tanh(layer(h)) * self.factor)
        return self.finish(h)

    def finish(self, h):
        return h.square().mean()


def graph_of(model, x=X):
    return lower(capture(model.train(), (x,), {}))


def test_the_names_differ_and_the_graph_is_the_same():
    one, other = graph_of(Step()), graph_of(Step(unused=2))
    assert [op.name for op in one.ops] != [op.name for op in other.ops] and one != other
    assert fingerprint(one) == fingerprint(other) and wiring(one) == wiring(other)


class Relu(Step):
    def forward(self, x):
        return self.finish(torch.relu(self.first(x)))


class Gelu(Step):
    def forward(self, x):
        return self.finish(nn.functional.gelu(self.first(x)))


class Chain(Step):
    def forward(self, x):
        a = torch.sin(x)
        return (torch.cos(a) * a).sum()


class Rewired(Step):
    def forward(self, x):
        a = torch.sin(x)
        return (torch.cos(x) * a).sum()


class Pair(Step):
    def forward(self, x):
        h = self.first(x)
        return torch.sin(h), torch.cos(h)


class Swapped(Pair):
    def forward(self, x):
        return super().forward(x)[::-1]


class Turned(Step):
    """The same kernels on the same storages; one looks at a square matrix transposed."""

    def forward(self, x):
        h = self.first(x)
        return (h @ h.t() @ h).sum() if self.unused else (h.t().t() @ h.t() @ h).sum()


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "one, other",
    [
        (Relu(), Gelu()),
        (Step(factor=3.0), Step(factor=3.5)),
        (Step(), Step(hidden=24)),
        (Step(), Step(layers=2)),
        (Pair(), Swapped()),
        (Turned(0), Turned(1)),
    ],
    ids=["kernel", "scalar", "shape", "ops", "output position", "view"],
)
def test_other_steps_do_not_match(one, other):
    assert fingerprint(graph_of(one)) == fingerprint(graph_of(copy.deepcopy(one)))
    assert fingerprint(graph_of(one)) != fingerprint(graph_of(other))


def test_other_wiring_of_equal_kernels_does_not_match():
    x = X.clone().requires_grad_()
    one, other = graph_of(Chain(), x), graph_of(Rewired(), x)
    kernels = [[op.kernel for op in graph.ops[: graph.num_forward_ops]] for graph in (one, other)]
    assert kernels[0] == kernels[1] and fingerprint(one) != fingerprint(other)


def test_shapes_of_equal_bytes_do_not_match():
    x = torch.ones(4, 16)
    one, other = (graph_of(Flat(), x.view(*shape)) for shape in ((4, 16), (16, 4)))
    assert [value.nbytes for value in one.values] == [value.nbytes for value in other.values]
    assert wiring(one) == wiring(other) and fingerprint(one) != fingerprint(other)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.scale).sin().sum()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a plan that recomputes, and the model it was made for."""
    model, file = Step(), tmp_path_factory.mktemp("plans") / "plan.json"
    planned = plan(model, 0.8, (X,), **QUICK)
    assert planned.plan.solution.schedule.recomputes()
    planned.plan.save(file)
    return file, planned


def test_a_plan_is_applied_to_a_capture_of_other_names(made):
    file, planned = made
    model = Step(unused=2)
    loaded = Plan.load(file)
    again = apply(loaded, model, (X,))
    theirs = again.plan
    assert [op.name for op in theirs.graph.ops] == [op.name for op in graph_of(model).ops]
    assert [op.name for op in theirs.graph.ops] != [op.name for op in loaded.graph.ops]
    assert (theirs.solution, theirs.peak_bytes) == (loaded.solution, loaded.peak_bytes)
    assert [op.cost_ns for op in theirs.graph.ops] == [op.cost_ns for op in loaded.graph.ops]
    assert again.plan.measured_bytes == planned.plan.measured_bytes
    assert verify(again, (X,), rounds=1).exact


def test_what_was_set_aside_travels(tmp_path):
    plan(Step(), 1.0, (X,), reserve=5000, **QUICK).plan.save(tmp_path / "plan.json")
    again = apply(Plan.load(tmp_path / "plan.json"), Step(unused=1), (X,))
    assert again.plan.graph.value["(reserved)"].nbytes == 5000


def test_a_plan_of_another_step_is_refused(made):
    for model, said in (
        (Step(unused=1, factor=3.5), r"aten\.mul\.Tensor, is called with .*, 3\.0 in the plan and .*, 3\.5 in the model"),
        (Step(unused=1, hidden=24), r"parameter 0 is float32\[16, 8\] in the plan and float32\[24, 8\] in the model"),
        (Step(unused=1, layers=2), r"the plan has \d+ parameters, the model \d+"),
    ):
        with pytest.raises(PlanFileError, match=said):
            apply(Plan.load(made[0]), model, (X,))


def test_a_bare_graph_is_no_plan_to_apply(made):
    loaded = Plan.load(made[0])
    ops = tuple(replace(op, kernel="", arguments="") for op in loaded.graph.ops)
    with pytest.raises(PlanFileError, match="does not say which kernels"):
        apply(replace(loaded, graph=replace(loaded.graph, ops=ops)), Step(), (X,))


def test_a_sweeps_plan_is_applied_to_a_capture_of_other_names(tmp_path):
    sweep_of(graph_of(Step()), points=3, limits=Limits(0.5)).save(tmp_path / "sweep.json")
    lowest = Sweep.load(tmp_path / "sweep.json").points[0]
    made = Sweep.load(tmp_path / "sweep.json").plan(lowest)
    assert verify(apply(made, Step(unused=1), (X,)), (X,), rounds=1).exact


class Fickle(Step):
    """Another name for the same call at every second capture, and at every size."""

    def forward(self, x):
        if len(x) != len(X):
            torch.tanh(x * 5).mul(2).sum()
        return super().forward(x)


def test_a_smaller_size_whose_nodes_are_called_otherwise_runs_planned():
    model = Fickle()
    planned = plan(copy.deepcopy(model), 0.8, (X,), dynamic=True, strict=True, **QUICK)
    assert planned.plan.solution.schedule.recomputes()
    for training in (model, planned):
        torch.manual_seed(3)
        training(X[:9]).backward()  # where it did not run planned, `strict` would make it an error
    for ours, theirs in zip(planned.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_batches_whose_nodes_are_called_otherwise_are_looked_ahead_from():
    smaller, larger = (graph_of(Step(unused=unused), X[:n]) for unused, n in ((0, 2), (1, 3)))
    ahead = extrapolated(smaller, larger, 5)
    assert ahead is not None and [op.name for op in ahead.ops] == [op.name for op in larger.ops]
    real = graph_of(Step(), X[:7])
    pairs = zip(places(ahead), places(real), strict=True)
    assert all(ahead.value[one].nbytes == real.value[other].nbytes for one, other in pairs)
    assert extrapolated(smaller, graph_of(Step(layers=2), X[:3]), 5) is None
