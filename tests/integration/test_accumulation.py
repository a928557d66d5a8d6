"""Accumulating gradients, and several forwards in flight: exact, and peaks as predicted, to the byte."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from planner import Plan, apply, apply_units, plan, plan_units, sweep, unplan, verify
from planner.graph.graph import Kind
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.profiler.memory import logical_peak

CPU = torch.device("cpu")
QUICK = {"progress": False}


def wide():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(256, 1)), torch.randn(32, 256)


def deep():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(8)]
    return nn.Sequential(*blocks, nn.Linear(64, 1)), torch.randn(512, 64)


MODELS = {"wide": wide, "deep": deep}


def backward(module, x):
    out = module(x)
    out.backward(torch.ones_like(out))


def resident(made):
    return made.graph.resident_bytes


def peak_above(module, x):
    return logical_peak(lambda: backward(module, x), CPU)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("num_stages", [1, 2, 8, 64])
@pytest.mark.parametrize(("name", "share"), [("wide", 1.0), ("deep", 1.0), ("deep", 0.7)])
def test_both_micro_steps_fit_and_the_second_peaks_as_predicted(name, share, num_stages):
    model, x = MODELS[name]()
    planned = plan(model, share, (x,), accumulate=True, num_stages=num_stages, check=False, **QUICK)
    made = planned.plan
    held = sum(parameter.nbytes for parameter in model.parameters())
    backward(planned, x)  # what a first call allocates for good
    planned.zero_grad(set_to_none=True)
    first = resident(made) - held + peak_above(planned, x)
    second = resident(made) + peak_above(planned, x)
    assert second == made.peak_bytes
    assert first <= second <= made.budget_bytes


class Tied(nn.Module):
    """A weight that is read again after its gradient is there."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(F.gelu(self.inner(F.gelu(self.outer(x)))))


OUTSIDE = {
    "a wide head": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 300)),
    "no bias": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 300, bias=False)),
    "an activation last": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 300), nn.Tanh()),
    "tied": Tied,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("num_stages", [1, 8])
@pytest.mark.parametrize("make", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_loss_outside_of_the_model_peaks_as_predicted(make, num_stages):
    """A gradient is returned after the last read of its parameter, which may be in a later stage."""
    planned = plan(make(), 1.0, (torch.randn(512, 64),), accumulate=True, num_stages=num_stages, progress=False)
    assert planned.plan.measured_bytes == planned.plan.peak_bytes


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_eagers(name):
    model, x = MODELS[name]()
    twin = copy.deepcopy(model)
    planned = plan(model, {"wide": 1.0, "deep": 0.7}[name], (x,), accumulate=True, **QUICK)
    for _ in range(3):
        backward(planned, x)
        backward(twin, x)
    expected = dict(twin.named_parameters())
    assert all(torch.equal(parameter.grad, expected[n].grad) for n, parameter in planned.named_parameters())
    assert planned.num_planned_calls == 3
    assert planned.plan.measured_bytes == planned.plan.peak_bytes
    report = verify(planned, (x,), rounds=1)
    assert report.exact and report.measured_peak_bytes == planned.plan.peak_bytes


def test_a_plan_that_does_not_count_them_says_so_once():
    model, x = wide()
    planned = plan(model, 1.0, (x,), **QUICK)
    backward(planned, x)
    with pytest.warns(UserWarning, match=r"accumulate=True\): this step finds .* of gradients"):
        backward(planned, x)
    backward(planned, x)  # warnings are errors


def test_gradients_that_fit_the_budget_are_no_matter():
    model, x = wide()
    least = plan(model, 1.0, (x,), **QUICK).plan.peak_bytes
    planned = plan(model, least + sum(p.nbytes for p in model.parameters()), (x,), **QUICK)
    for _ in range(2):
        backward(planned, x)


def test_a_plan_of_an_accumulating_step_is_saved_and_applied(tmp_path):
    model, x = deep()
    made = plan(model, 0.85, (x,), accumulate=True, num_stages=4, **QUICK).plan
    made.save(tmp_path / "plan.json")
    again = apply(Plan.load(tmp_path / "plan.json"), model, (x,), progress=False)
    assert again.plan == made and again.plan.measured_bytes == made.peak_bytes


@pytest.mark.one_in(4)
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_forwards_in_flight_peak_as_predicted(count, share):
    model, x = deep()
    planned = plan(model, share, (x,), in_flight=count, effort=4.0, **QUICK)
    made = planned.plan

    def step():
        outs = [planned(x) for _ in range(count)]
        while outs:
            out = outs.pop(0)
            out.backward(torch.ones_like(out))
            del out

    def one_by_one():
        planned.zero_grad(set_to_none=True)
        outs = [planned(x) for _ in range(count)]
        first = outs.pop(0)
        first.backward(torch.ones_like(first))
        return outs

    step()
    planned.zero_grad(set_to_none=True)
    measured = resident(made) + logical_peak(one_by_one, CPU)
    assert measured == made.peak_bytes <= made.budget_bytes
    plain = simulate(made.graph, keep_all(made.graph)).peak_bytes
    assert made.plain.peak_bytes == plain and (share == 1.0 or made.peak_bytes < plain)


def test_sweeps_count_what_is_in_flight_and_accumulated():
    model, x = deep()
    alone = sweep(model, args=(x,), points=3, effort=0.3, **QUICK)
    several = sweep(model, args=(x,), points=3, effort=0.3, in_flight=3, accumulate=True, **QUICK)
    assert several.plain.peak_bytes > 2 * alone.plain.peak_bytes
    assert any(value.kind is Kind.RESERVED for value in several.graph.values)
    assert all(point.peak_bytes <= point.budget_bytes for point in several.points)


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_gradients_that_are_there_are_no_error(sparse):
    """Their bytes say nothing of the next step's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16, sparse=sparse), nn.Linear(16, 16), nn.Linear(16, 1))
    twin, x = copy.deepcopy(model), torch.randint(64, (8,))
    planned = plan(model, 10**9, (x,), **QUICK)
    for _ in range(3):
        backward(planned, x)
        backward(twin, x)
    expected = [parameter.grad.to_dense() for parameter in twin.parameters()]
    assert all(torch.equal(one.grad.to_dense(), other) for one, other in zip(planned.parameters(), expected, strict=True))


def test_gradients_are_found_wherever_they_are():
    """Some parameters have none: those of another optimizer were cleared."""
    model, x = wide()
    planned = plan(model, 1.0, (x,), **QUICK)
    backward(planned, x)
    for parameter in model[0].parameters():
        parameter.grad = None
    with pytest.warns(UserWarning, match="this step finds .* of gradients"):
        backward(planned, x)


class Wrapped(nn.Module):
    """Blocks that the training loop may put into `torch.utils.checkpoint`."""

    def __init__(self):
        super().__init__()
        self.blocks, self.is_wrapped = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)), False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_wrapped else block(x)
        return x.sum()


def test_a_forward_that_runs_again_in_the_backward_finds_what_is_counted():
    """The gradients of later blocks, of this very step."""
    model, x = Wrapped(), torch.randn(32, 64)
    units = plan_units(model, 1.0, (x,), **QUICK)
    model.is_wrapped = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*forwards wait")
        for _ in range(2):
            model(x).backward()
            model.zero_grad()
    assert not any(module.num_unplanned_calls for module in units.planned.values())
    model(x).backward()
    with pytest.warns(UserWarning, match="this step finds .* of gradients"):
        model(x).backward()


def test_other_sizes_do_not_say_it_again():
    model, x = wide()
    planned = plan(model, 1.0, (x,), dynamic=True, **QUICK)
    backward(planned, x)
    with pytest.warns(UserWarning, match="this step finds .* of gradients"):
        backward(planned, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(planned, x[:8])
        backward(planned, x[:8])
    assert planned.num_planned_calls == 4


def test_a_plan_is_recognized_where_one_kernel_writes_several_gradients():
    """Weight and bias of a convolution, which end a stage together: 14 gradients of 8 kernels in at most 10 stages."""
    torch.manual_seed(0)
    layers = [layer for width in (3, 4, 4) for layer in (nn.Conv2d(width, 4, 3), nn.BatchNorm2d(4))]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)), torch.randn(8, 3, 8, 8)
    options = {**QUICK, "accumulate": True}
    made = plan(model, 1.0, (x,), num_stages=10, dynamic=True, **options)
    assert apply(made.plan, model, (x,), num_stages=10, progress=False, check=False).mismatch((x,), {}) is None
    made(x[:3])
    assert made.num_planned_calls == 1 and not made._other_sizes.planned_anew


def test_audited_calls_in_flight_keep_the_budget():
    """The second call is audited, while the first holds what it saved."""
    model, x = deep()
    planned = plan(model, 0.6, (x,), in_flight=3, effort=4.0, **QUICK)
    made = planned.plan

    def step():
        outs = [planned(x) for _ in range(3)]
        out = outs.pop(0)
        out.backward(torch.ones_like(out))
        return outs

    copy.deepcopy(planned)(x).sum().backward()  # what a first call allocates for good
    assert resident(made) + logical_peak(step, CPU) <= made.budget_bytes


def train(module, x, *, factor: float):
    """Two iterations of two micro-steps, with a scaled loss and clipped gradients; weights, norms of gradients, scales."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    found = []
    for _ in range(2):
        for rows in x.chunk(2):
            scaler.scale(module(rows).square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        found.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        found.append(torch.tensor(scaler.get_scale()))
    return [*(parameter.detach() for parameter in module.parameters()), *found]


@pytest.mark.parametrize("factor", [0.5, 2.0**126], ids=["", "overflows"])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_scaled_losses_and_clipped_gradients_are_eagers(factor, share):
    """The gradients that come in are other numbers in each micro-step; where they overflow, the step is skipped."""
    model, x = deep()
    twin = copy.deepcopy(model)
    planned = plan(model, share, (x[:256],), accumulate=True, **QUICK)
    ours, eagers = train(planned, x, factor=factor), train(twin, x, factor=factor)
    assert all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in zip(ours, eagers, strict=True))
    assert planned.num_planned_calls == 4
    assert (eagers[-1] < 2.0**10) == (factor > 1)  # the scale went down after an overflow, else up


def test_unscaling_and_clipping_stay_within_the_budget():
    model, x = wide()
    planned = plan(model, 1.0, (x,), accumulate=True, **QUICK)
    optimizer, scaler = torch.optim.SGD(planned.parameters(), lr=0.1), torch.amp.GradScaler("cpu")

    def second_micro_step():
        scaler.scale(planned(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(planned.parameters(), 0.1)

    scaler.scale(planned(x).square().mean()).backward()
    # of the loss, which the loop computes, the square and its gradient come on top
    assert resident(planned.plan) + logical_peak(second_micro_step, CPU) <= planned.plan.budget_bytes + 4 * 32 * 4


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x):
        return x + super().forward(x)


class Picks(nn.Module):
    """Blocks between outer code whose shape may depend on the data."""

    def __init__(self, picks):
        super().__init__()
        self.embed, self.head, self.picks = nn.Linear(8, 32), nn.Linear(32, 1), picks
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[hidden[:, 0] > hidden[:, 0].median()] if self.picks else hidden).square().mean()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("num_stages", [1, 8])
@pytest.mark.parametrize("picks", [False, True], ids=["captured", "measured"])
def test_units_count_the_gradients_that_are_there(picks, num_stages, tmp_path):
    torch.manual_seed(0)
    model, x = Picks(picks), torch.randn(256, 8)
    twin = copy.deepcopy(model)
    units = plan_units(model, 0.8, (x,), accumulate=True, effort=0.3, num_stages=num_stages, **QUICK)
    assert units.plan.outer.is_measured == picks
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model(x).backward()  # what a first call allocates for good
    model.zero_grad(set_to_none=True)
    first = weights + x.nbytes + logical_peak(lambda: model(x).backward(), CPU)
    second = 2 * weights + x.nbytes + logical_peak(lambda: model(x).backward(), CPU)
    assert first <= second == units.plan.peak_bytes == units.plan.measured_bytes <= units.plan.budget_bytes
    for _ in range(2):
        twin(x).backward()
    expected = dict(twin.named_parameters())
    assert all(torch.equal(parameter.grad, expected[name].grad) for name, parameter in model.named_parameters())
    assert units.plan.accumulates and "accumulated over several steps" in str(units)
    report = units.verify((x,))
    assert report.exact and report.measured_peak_bytes == second
    units.save(tmp_path / "units.json")
    unplan(model)
    assert apply_units(tmp_path / "units.json", model, (x,), num_stages=num_stages, progress=False).plan == units.plan
