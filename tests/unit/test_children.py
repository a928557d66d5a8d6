"""plan_children, the former name: models whose own forward no plan can hold train with their submodules planned."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner import CaptureError, InputError, NoScheduleFoundError, plan, plan_children, plan_units, unplan
from planner.profiler.memory import logical_peak
from tests.support.training import assert_same, trajectory
from tests.support.zoo import check


def tower(width=32, depth=3):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in range(depth)))


class Picky(nn.Module):
    """Trains on the rows that it likes: a shape that depends on the data, in the model's own forward."""

    def __init__(self):
        super().__init__()
        self.left, self.right = tower(), tower()
        self.head = nn.Linear(32, 4)

    def forward(self, x, labels):
        hidden = self.right(self.left(x).relu())
        liked = hidden.sum(1) > hidden.sum(1).median()
        return F.cross_entropy(self.head(hidden[liked]), labels[liked])


class Inner(nn.Module):
    """A submodule that does so itself, around one that does not; of its two outputs only one is used."""

    def __init__(self):
        super().__init__()
        self.body = tower()

    def forward(self, x):
        hidden = self.body(x)
        return hidden[hidden.sum(1) > 0], hidden * 2


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.side = tower(), nn.Linear(32, 32)

    def forward(self, x):
        hidden = self.body(x)
        return {"unused": self.side(hidden), "used": hidden.tanh()}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.twice = TwoOutputs(), Inner(), nn.Linear(32, 32)
        self.tied, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.again.weight = self.tied.weight

    def forward(self, x):
        hidden = self.first(x)["used"]
        hidden, _ = self.inner(self.twice(self.twice(hidden)))
        return self.again(self.tied(hidden)).square().mean()


def picky(rows=512):
    torch.manual_seed(0)
    return Picky().train(), (torch.randn(rows, 32), torch.randint(4, (rows,)))


def planned(model, budget, args, **options):
    with pytest.warns(DeprecationWarning, match="plan_children is now plan_units"):
        return plan_children(model, budget, args, costs="estimate", effort=0.5, progress=False, **options)


def measured(model, args):
    def step():
        model(*args).backward()

    step()
    model.zero_grad(set_to_none=True)
    resident = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers(), *args))
    return resident + logical_peak(step, torch.device("cpu"))


def test_what_plan_refuses_trains_in_parts_exactly_and_within_the_budget():
    model, args = picky()
    with pytest.raises(CaptureError, match="plan_units"):
        plan(model, 0.9, args, costs="estimate", progress=False)
    expected = trajectory(copy.deepcopy(model), args, {})
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    made = planned(model, 0.8, args)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert_same(before, list(model.parameters()))
    assert set(made.planned) == {"left", "right", "head"}
    assert made.peak_bytes <= made.budget_bytes < made.plain_bytes
    assert made.plain_bytes == measured(copy.deepcopy(model), args)
    assert any(module.plan.timeline.time_ns > module.plan.plain.time_ns for module in made.planned.values())
    made.install(strict=True)
    assert measured(copy.deepcopy(model), args) == made.peak_bytes
    assert_same(expected, trajectory(model, args, {}))
    made.uninstall()
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_larger_budget_recomputes_less():
    model, args = picky()
    tight, loose = planned(model, 0.75, args), planned(model, 0.95, args)
    spent = [sum(m.plan.timeline.time_ns - m.plan.plain.time_ns for m in made.planned.values()) for made in (tight, loose)]
    assert 0 <= spent[1] < spent[0]
    assert tight.peak_bytes < loose.peak_bytes


def test_it_goes_down_to_what_can_be_planned_and_names_the_rest():
    torch.manual_seed(0)
    model, args = Outer().train(), (torch.randn(256, 32),)
    expected = trajectory(copy.deepcopy(model), args, {})
    made = planned(model, 1.0, args)
    assert set(made.planned) == {"first", "inner.body", "twice"}
    assert "weight" in made.left["tied"] and "weight" in made.left["again"]
    assert "first" in str(made) and "twice" in str(made)
    made.install(strict=True)
    assert_same(expected, trajectory(model, args, {}))


def test_a_budget_below_every_level_says_how_low_it_gets():
    model, args = picky()
    with pytest.raises(NoScheduleFoundError, match=r"a measured step peaks at .*\(\d+ bytes\); the budget is"):
        planned(model, 0.2, args)


def test_bad_input():
    model, args = picky()
    with pytest.raises(InputError, match=r"call model\.train\(\)"):
        planned(model.eval(), 0.5, args)
    with pytest.raises(CaptureError, match="no submodule of the model can be captured"):
        planned(nn.Sequential(nn.LSTM(8, 8)).train(), 0.5, (torch.randn(4, 2, 8),), loss=lambda out: [out[0]])


@pytest.mark.zoo
def test_speech_model_with_its_masks_and_ctc_loss_under_autocast():
    model, args, kwargs = check.build("wav2vec2")
    precision = "bf16"
    expected = check.trajectory(copy.deepcopy(model), args, kwargs, precision)
    with check.seeded(), check.cast(precision):
        made = plan_units(model, 0.92, args, kwargs, costs="estimate", effort=0.5, progress=False)
    assert made.planned and made.peak_bytes <= made.budget_bytes
    assert not check.differences(expected, check.trajectory(model, args, kwargs, precision))
    unplan(model)


class Moody(nn.Module):
    """Runs one of its halves, by an iterator in a place where planning cannot put it back."""

    def __init__(self, turns):
        super().__init__()
        half = lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.halves, self.turns = nn.ModuleList([half(), half()]), frozenset([turns])

    def forward(self, x):
        (turns,) = self.turns
        hidden = self.halves[next(turns)](x)
        return hidden[hidden.sum(1) > 0].square().mean()


def test_what_is_not_called_every_time_is_left():
    first = 3  # the observed step, and two that are measured
    model, args = Moody(iter(first * [0] + 1000 * [1])).train(), (torch.randn(64, 32),)
    with pytest.raises(CaptureError, match="a second forward with the same random numbers calls it another number of times"):
        planned(model, 1.0, args)
