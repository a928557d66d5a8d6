"""Kernels whose real outputs are laid out otherwise than their fakes: the trace follows the real ones."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import InfeasibleBudgetError, NoScheduleFoundError, apply, plan
from planner.kernels import observed
from planner.results.plan import Plan
from planner.tracer import real_layouts
from planner.tracer.real_layouts import capture
from tests.support.training import assert_same, trajectory


class Permuted(nn.Module):
    """A layer between a permutation and its inverse, then one that needs a view or a copy of what comes out."""

    def __init__(self, layer: nn.Module, perm: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.layer, self.perm, self.shape = layer, perm, shape

    @property
    def given(self) -> list[int]:
        """Sizes of an input."""
        return [self.shape[self.perm.index(i)] for i in range(len(self.perm))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = torch.tanh(x * self.scale)
        out = self.layer(inside.permute(self.perm))
        return torch.tanh(out.permute([self.perm.index(i) for i in range(len(self.perm))]).reshape(-1, 2)).square().mean()


def planned_at_the_lowest(model, args):
    """A plan with as little memory as a few tries find, from 0.5 of the plain peak up."""
    for budget in (0.5, 0.6, 0.7, 0.8, 0.9):
        try:
            return plan(model, budget, args, costs="estimate", progress=False, effort=0.3)
        except (InfeasibleBudgetError, NoScheduleFoundError):
            continue
    return plan(model, 1.0, args, costs="estimate", progress=False)


def assert_trains_alike(model, args):
    expected = trajectory(copy.deepcopy(model), args, {})
    for make in (lambda m: plan(m, 1.0, args, costs="estimate", progress=False), lambda m: planned_at_the_lowest(m, args)):
        planned = make(copy.deepcopy(model))
        assert planned.mismatch(args, {}) is None
        assert_same(expected, trajectory(planned, args, {}))


LAYERS = {
    "batch_norm_1d": (lambda: nn.BatchNorm1d(6), (4, 6, 8)),
    "batch_norm_2d": (lambda: nn.BatchNorm2d(4), (2, 4, 6, 8)),
    "batch_norm_3d": (lambda: nn.BatchNorm3d(4), (2, 4, 2, 6, 8)),
    "batch_norm_untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 6, 8)),
    "batch_norm_evaluating": (lambda: Frozen(), (2, 4, 6, 8)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 6, 8)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 6, 8)),
    "layer_norm": (lambda: nn.LayerNorm(8), (2, 4, 6, 8)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 8)),
    "dropout": (lambda: nn.Dropout(0.3), (2, 4, 6, 8)),
}


class Frozen(nn.Module):
    """Batch norm by given statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = nn.Parameter(torch.rand(4), False), nn.Parameter(torch.rand(4) + 0.5, False)
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, None, training=False)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_permuted_inputs_train_bit_exactly(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    perms = [p for p in itertools.permutations(range(len(shape))) if p[0] == 0]
    for perm in perms[:4] if len(shape) > 3 else perms:
        model = Permuted(make(), perm, shape)
        assert_trains_alike(model, (torch.randn(model.given),))


class Normed(nn.Module):
    """A layer between two convolutions: its backward takes more memory than any other kernel where its statistics are wide."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Conv2d(3, 16, 3), layer, nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.layer(self.a(x)))).square().mean()


NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(16),
    "batch norm, no weights": lambda: nn.BatchNorm2d(16, affine=False),
    "batch norm of float64 statistics": lambda: nn.BatchNorm2d(16).double(),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "instance norm": lambda: nn.InstanceNorm2d(16, affine=True),
    "layer norm": lambda: nn.LayerNorm(14),
    "prelu": lambda: nn.PReLU(),
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_in_mixed_precision_memory_is_as_predicted(name: str, dtype: torch.dtype) -> None:
    """Real statistics are float32 where the fakes have the input's dtype, and then the backward takes other memory."""
    torch.manual_seed(0)
    model, x = Normed(NORMS[name]()), torch.randn(4, 3, 16, 16)
    budgets = iter((1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    with torch.autocast("cpu", dtype):
        try:
            model(x)
        except RuntimeError as error:
            pytest.skip(f"eager has no kernel for it: {error}")
        with contextlib.suppress(InfeasibleBudgetError, NoScheduleFoundError):
            for budget in budgets:
                made = plan(model, budget, (x,), progress=False, effort=2).plan
                assert made.measured_bytes == made.peak_bytes
    assert next(budgets) < 0.9, "a plan that recomputes was among them"


def test_a_transposed_batch_norm_before_a_linear() -> None:
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

        def forward(self, x):
            return self.two(self.norm(self.one(x).transpose(1, 2)).transpose(1, 2)).square().mean()

    assert_trains_alike(Tabular(), (torch.randn(2, 24, 20),))


def test_convolutions_with_permuted_weights() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(3, 3, 4, 8) / 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(F.conv2d(x, self.weight.permute(3, 2, 0, 1), padding=1)).square().mean()

    x = torch.randn(2, 4, 6, 6)
    assert_trains_alike(Transposed(), (x,))
    assert_trains_alike(Transposed(), (x.contiguous(memory_format=torch.channels_last),))


@pytest.fixture(scope="module")
def sloppy():
    """An operator whose fake returns a contiguous tensor, and whose kernel a transposed one; its gradient likewise."""

    @torch.library.custom_op("test_strides::turned", mutates_args=())
    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).transpose(0, 1).contiguous().transpose(0, 1)

    turned.register_fake(torch.empty_like)
    turned.register_autograd(lambda ctx, grad: turned(grad.contiguous()))
    return turned


def test_a_custom_op_whose_fake_has_other_strides(sloppy) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = sloppy(torch.tanh(self.one(x)))
            scale = 2.0 if y.is_contiguous() else 3.0  # Python sees the strides, too
            return self.two(torch.tanh(y.reshape(-1, 8)) * scale).square().mean()

    assert_trains_alike(Model(), (torch.randn(16, 8),))


def test_a_custom_op_whose_fake_has_another_shape_runs_as_it_is() -> None:
    @torch.library.custom_op("test_strides::half", mutates_args=())
    def half(x: torch.Tensor) -> torch.Tensor:
        return x[: len(x) // 2].clone()

    half.register_fake(torch.empty_like)
    half.register_autograd(lambda ctx, grad: grad.sum() * torch.ones(16, 8))

    class Half(nn.Module):
        def forward(self, x):
            return half(x)

    model = nn.Sequential(nn.Linear(8, 8), Half(), nn.Linear(8, 2))
    planned = plan(copy.deepcopy(model), 1.0, (torch.randn(16, 8),), costs="estimate", progress=False)
    assert planned.plan.provenance.opaque == ("1",)
    x = torch.randn(16, 8)
    planned(x).sum().backward()
    model(x).sum().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in planned.parameters()])


def test_a_saved_plan_is_applied_and_what_was_seen_is_not_needed(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Permuted(nn.BatchNorm1d(6), (0, 2, 1), (4, 6, 8))
    args = (torch.randn(model.given),)
    expected = trajectory(copy.deepcopy(model), args, {})
    made = plan(copy.deepcopy(model), 1.0, args, progress=False).plan  # measured
    made.save(tmp_path / "plan.json")
    monkeypatch.setattr(observed, "_SEEN", {})  # as in another process
    monkeypatch.setattr(observed, "_FOLLOWED", {})
    planned = apply(Plan.load(tmp_path / "plan.json"), copy.deepcopy(model), args)
    assert_same(expected, trajectory(planned, args, {}))


def test_smaller_inputs_of_a_dynamic_plan_follow_real_strides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Turned(nn.BatchNorm1d(6)), nn.Linear(6, 2))
    planned = plan(
        copy.deepcopy(model), 1.0, (torch.randn(5, 8, 6),), costs="estimate", progress=False, dynamic=True, strict=True
    )
    x = torch.randn(3, 8, 6)
    for module in (model, planned):
        module(x).square().mean().backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in planned.parameters()])


class Turned(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


def test_a_chain_of_kernels_whose_strides_come_to_light_one_by_one() -> None:
    class Rolls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(1) + 0.5)

        def forward(self, x):
            x = (x * self.weight).permute(0, 3, 1, 2)
            for size in range(9, 2, -1):  # each of another shape: the input of one is right when the one before was seen
                x = torch.tanh(torch.roll(x[..., :size, :size], 1, 1))
            return x.permute(0, 2, 3, 1).reshape(-1, 2).square().mean()

    assert_trains_alike(Rolls(), (torch.randn(2, 10, 10, 4),))


def test_nothing_is_captured_again_where_fakes_are_right(monkeypatch) -> None:
    count, once = [], real_layouts.capture_once
    monkeypatch.setattr(real_layouts, "capture_once", lambda *args, **kwargs: count.append(1) or once(*args, **kwargs))
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    capture(model, (torch.randn(4, 8),))
    assert len(count) == 1
