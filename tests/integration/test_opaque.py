"""Submodules that cannot be captured run as they are, inside a planned step: exact, measured, recomputed where that pays."""

from __future__ import annotations

import copy
import gc
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import Plan, apply, plan
from planner.errors import CaptureError, InputError, OpaqueModuleError
from planner.graph.graph import Kind
from planner.graph.source import Source
from planner.profiler.memory import allocations_of, logical_peak
from planner.runtime.module import CheckpointedModule
from tests.support.models import Wrapped
from tests.support.training import assert_same, trajectory

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def planned_of(model, x=X, budget=1.0, **options) -> CheckpointedModule:
    return plan(model.train(), budget, (x,), progress=False, **{"costs": "estimate", **options})


def as_they_are(module) -> str:
    return ", ".join(module.plan.provenance.opaque)


def check_exact(model, module, x=X, **options) -> None:
    random.seed(0)
    expected = trajectory(copy.deepcopy(model), (x,), {}, **options)
    random.seed(0)
    assert_same(expected, trajectory(module, (x,), {}, **options))


class Residual(nn.Module):
    """`core` uses its input several times; the input is used before, beside and after it as well."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.before, self.core, self.after = nn.Linear(16, 16), core, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.before(x).tanh()
        early = h.sin()
        return self.after(self.core(h) + h) + h * early


class ManyUses(nn.Module):
    """Uses its input and its weight three times; draws dropout if told to."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.weight, self.p = nn.Parameter(torch.randn(16, 16) / 4), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(F.dropout(x @ self.weight, self.p, self.training))
        return h * x + (x * 1.5) @ self.weight.T + x @ (self.weight * 0.3)


class Experts(nn.Module):
    """Which rows go where depends on the data; an expert may get none, and then no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, choice = torch.zeros_like(x), (x[:, 0] * 2).long().clamp(0, 3)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == i).flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class Shifts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(random.randrange(3), 0) * 2


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_kernels_run_as_they_are(kind):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = nn.Linear(16, 8), kind(8, 8, num_layers=2, dropout=0.2), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.cell(self.embed(x).tanh().unflatten(0, (8, 8)))[0])

    model = Wrapped(Recurrent())
    module = planned_of(model)
    assert as_they_are(module) == "body.cell"
    check_exact(model, module, accumulate=2)


def test_a_module_with_hooks_runs_as_it_is_and_its_hooks_are_called_as_ever():
    model = Wrapped(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)))
    calls: list[str] = []
    model.body[1].register_forward_hook(lambda *_: calls.append("forward"))
    model.body[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    module = planned_of(model)
    assert calls == []  # planning runs it, and leaves nothing behind
    check_exact(model, module)
    assert calls == ["forward", "backward"] * 6  # three steps, plain and planned


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_added_in_eagers_order(p, autocast):
    model = Wrapped(Residual(ManyUses(p)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module = planned_of(model, opaque=["body.core"])
        plain, ours = copy.deepcopy(model), module
    assert as_they_are(module) == "body.core"
    for m in (plain, ours):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = m(X)["loss"]
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


class Sharing(nn.Module):
    """An opaque submodule that uses a layer several times, is called several times, and shares the layer with others."""

    def __init__(self, uses: int, calls: int, shared: str) -> None:
        super().__init__()
        self.before, self.core = nn.Linear(8, 8), nn.Module()
        self.core.layer, self.core.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        if shared == "two names":
            self.core.again = self.core.layer
        elif shared == "tied":
            self.core.again = nn.Linear(8, 8)
            self.core.again.weight = self.core.layer.weight
        elif shared == "nested":
            self.core.again = nn.Sequential(nn.Tanh(), self.core.layer)
        elif shared == "named twice itself":
            self.same = self.core
        self.after = self.core.layer if shared == "used outside" else nn.Linear(8, 8)
        self.core.forward = self.run
        self.uses, self.calls = uses, calls

    def run(self, x):
        for _ in range(self.uses):
            x = self.core.norm(getattr(self.core, "again", self.core.layer)(torch.tanh(self.core.layer(x))))
        return x

    def forward(self, x):
        x = torch.tanh(self.before(x))
        for _ in range(self.calls):
            x = torch.tanh(getattr(self, "same", self.core)(torch.tanh(self.core(x))))
        return self.after(x).square().mean()


@pytest.mark.one_in(10)
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("shared", ["", "two names", "tied", "nested", "named twice itself", "used outside"])
def test_weights_that_are_used_in_several_places(uses, calls, shared):
    torch.manual_seed(0)
    model, x = Sharing(uses, calls, shared), torch.randn(6, 8)
    twin = copy.deepcopy(model)
    twin.core.forward = twin.run
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    planned = plan(model, 1.0, (x,), opaque=["core"], costs="estimate", progress=False)
    assert planned.mismatch((x,), {}) is None
    assert_same(trajectory(twin, (x,), {}), trajectory(planned, (x,), {}))
    assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def test_a_part_is_recomputed_where_that_pays_and_keeps_its_draws():
    model = Wrapped(nn.Sequential(*(Residual(ManyUses(0.2)) for _ in range(4))))
    names = [f"body.{i}.core" for i in range(4)]
    x = torch.randn(512, 16)
    full = planned_of(model, x, opaque=names).plan
    module = planned_of(model, x, int(full.plain.peak_bytes * 0.6), opaque=names)
    again = {
        module.plan.graph.ops[module.plan.solution.schedule.steps[t]].name for t in module.plan.solution.schedule.recomputes()
    }
    assert any(name.startswith("opaque_forward") for name in again)
    check_exact(model, module, x, accumulate=2)
    resident = sum(module.plan.graph.value[n].nbytes for n in module.plan.graph.inputs)
    module.zero_grad()
    assert logical_peak(lambda: module(x)["loss"].backward(), module.device) + resident <= module.plan.budget_bytes


def test_an_expert_without_rows_gets_no_gradient_as_in_eager():
    model = Wrapped(Residual(Experts()))
    module = planned_of(model)
    assert as_they_are(module) == "body.core"
    plain = copy.deepcopy(model)
    for x in (X, X.abs() * 0.1, X - 3):  # all experts, few, one
        for m in (plain, module):
            m.zero_grad()
            m(x)["loss"].backward()
        for a, b in zip(plain.parameters(), module.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
    assert any(p.grad is None for p in plain.parameters())


def test_random_choices_of_python_stay_random():
    model = Wrapped(nn.Sequential(nn.Linear(16, 16), Shifts(), nn.Linear(16, 4)))
    module = planned_of(model)
    assert as_they_are(module) == "body.1"
    check_exact(model, module)
    random.seed(1)
    assert len({module(X)["out"][0, 0].item() for _ in range(20)}) > 1


def test_copies_and_pickles_train_with_their_own_opaque_module():
    model = Wrapped(Residual(Experts()))
    module = planned_of(model)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.body.core.experts[0].weight is not model.body.core.experts[0].weight
        check_exact(model, twin)


def test_a_saved_plan_applies_though_the_data_of_a_part_are_others(tmp_path):
    model = Wrapped(Residual(Experts())).train()
    planned_of(model, X).plan.save(tmp_path / "plan.json")
    module = apply(Plan.load(tmp_path / "plan.json"), model, (X.abs() * 0.1,))
    check_exact(model, module)


def test_a_retained_graph_is_used_twice():
    model = Wrapped(Residual(ManyUses()))
    module, plain = planned_of(model, opaque=["body.core"]), copy.deepcopy(model)
    for m in (plain, module):
        loss = m(X)["loss"]
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_a_parameters_own_hook_is_called_once():
    model = Wrapped(Residual(ManyUses()))
    module = planned_of(model, opaque=["body.core"])
    calls = []
    model.body.core.weight.register_hook(calls.append)
    module(X)["loss"].backward()
    assert len(calls) == 1


def test_nothing_is_left_of_a_step():
    model = Wrapped(Residual(Experts()))
    module = planned_of(model)

    def steps(num: int) -> None:
        for _ in range(num):
            module(X)  # dropped without a backward
            module(X)["loss"].backward()
            module.zero_grad()

    steps(1)
    gc.collect()  # what other tests left
    assert allocations_of(lambda: steps(1), module.device)[1:] == allocations_of(lambda: steps(4), module.device)[1:]


def test_plan_files_keep_their_names_of_the_kernels():
    """Plans that were saved before the functions were renamed are applied as before."""
    graph = planned_of(Wrapped(Residual(ManyUses())), opaque=["body.core"]).plan.graph
    assert {"planner.part", "planner.part_backward"} <= {op.kernel for op in graph.ops}


def test_the_saved_handle_counts_in_the_plan():
    model = Wrapped(Residual(ManyUses()))
    graph = planned_of(model, opaque=["body.core"]).plan.graph
    (part,) = (op for op in graph.ops if op.name == "opaque_forward")
    held = [graph.value[name].nbytes for name in part.writes]
    assert held[0] == X.nbytes and held[-1] > 0  # the result; what autograd keeps
    assert part.source == Source("body.core", note="runs as it is") and part.cost_ns > 0
    assert all(graph.value[name].kind is Kind.ACTIVATION for name in part.writes)


def test_a_part_that_cannot_be_one_is_taken_with_what_calls_it():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([Experts(), Scales()])

        def forward(self, x):
            return self.steps[1](self.steps[0](x), {})

    class Scales(nn.Module):
        def forward(self, x, cache):
            cache["rows"] = torch.nonzero(x[:, 0] > 0)
            return x.mul_(1 + len(cache["rows"]))  # writes into its argument

    model = Wrapped(nn.Sequential(nn.Linear(16, 16), Stack(), nn.Linear(16, 4)))
    module = planned_of(model)
    assert as_they_are(module) == "body.1"
    check_exact(model, module)


class Ragged(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0] > 0]


class Outliers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: 32 if (x > 100).any() else 64] * random.uniform(0.9, 1.1)


class Picks(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.core(x))


def test_a_result_whose_shape_depends_on_the_data_is_refused_because_training_would_end_at_another_batch():
    model = Wrapped(Picks(Ragged()))
    with pytest.raises(CaptureError, match=r"nonzero.* at body\.core .*shape depends on the data"):
        planned_of(model)
    for batch in (X, torch.ones(64, 16)):
        model(batch)["loss"].backward()


def test_a_result_of_another_shape_than_planned_is_a_clear_error():
    """Where nothing in the example shows that there is another shape."""
    module = planned_of(Wrapped(Picks(Outliers())))
    module(X)["loss"].backward()
    with pytest.raises(OpaqueModuleError, match=r"body\.core returned float32\[.*when it was planned.*larger part opaque"):
        module(torch.full((64, 16), 101.0))


def test_names_must_be_submodules():
    with pytest.raises(InputError, match=r"opaque='body\.cor' is no submodule.*body\.core"):
        planned_of(Wrapped(Residual(ManyUses())), opaque=["body.cor"])


def test_what_no_part_can_do_is_refused():
    class Writes(nn.Module):
        def forward(self, x):
            return x.mul_(2) + torch.nonzero(x).sum()

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.core = nn.Linear(16, 16), Writes()

        def forward(self, x):
            return self.core(self.linear(x)).sum()

    model = Top()
    with pytest.raises(CaptureError, match="nonzero"):
        planned_of(model)
    model(X).backward()
