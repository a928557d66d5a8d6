"""Real steps of a copy of the model: what they hold is counted, and what they leave behind is nothing."""

from contextvars import ContextVar

import pytest
import torch
from torch import nn

from planner import InputError
from planner.composite.trial import Trial
from planner.profiler.memory import logical_peak


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x, late=None):
        hidden = self.layer((x * 2).cos())
        return (hidden if late is None else hidden * late).square().mean()


def test_gradients_of_inputs_are_part_of_the_peak():
    """That of `late` is made first, and lives during the rest of the backward."""
    model, x, late = Doubles().train(), torch.randn(256, 16), torch.randn(256, 4, requires_grad=True)
    x.requires_grad_()
    trial = Trial(model, (x, late), {}, None)

    def step():
        model(x, late).backward()

    step()
    model.zero_grad()
    x.grad = late.grad = None
    resident = sum(p.nbytes for p in (*model.parameters(), x, late))
    assert trial.peak({}) == resident + logical_peak(step, torch.device("cpu"))


def test_a_step_that_fails_leaves_nothing_in_the_call():
    x = torch.randn(8, 16, requires_grad=True)
    trial = Trial(Doubles().train(), (x,), {}, None)
    x.grad = torch.ones_like(x)
    with pytest.raises(ValueError, match="after the step"), trial.untouched():
        trial.step.run()
        raise ValueError("after the step")
    assert torch.equal(x.grad, torch.ones_like(x)) and all(p.grad is None for p in trial.model.parameters())


def test_a_call_with_tensors_that_are_no_leaves():
    leaf = torch.randn(8, 16, requires_grad=True)
    x = leaf * 2
    trial = Trial(Doubles().train(), (x,), {}, None)
    assert trial.peak({}) is not None and leaf.grad is None
    x.sum().backward()  # its own graph is still there


COUNT, RUNS, TOTAL, LAST = 0, [], torch.zeros(4), ContextVar("last", default=None)


class SharesState(Doubles):
    """A copy of it shares globals and what functions hold with the model."""

    def __init__(self, held, fails=False):
        super().__init__()
        self.hold, self.fails = (lambda: held.add_(1)), fails

    def forward(self, x):
        global COUNT
        COUNT += 1
        RUNS.append(COUNT)
        TOTAL.add_(1)
        LAST.set(COUNT)
        self.hold()
        out = super().forward(x)
        if self.fails:
            raise ValueError("on purpose")
        return out


def test_steps_leave_no_trace_in_what_a_copy_shares_with_the_model():
    held, x = torch.zeros(4), torch.randn(8, 16)
    trial = Trial(SharesState(held).train(), (x,), {}, None)
    assert trial.peak({}) is not None and trial.record(["layer"])
    with pytest.raises(InputError, match="on purpose"):
        Trial(SharesState(held, fails=True).train(), (x,), {}, None)
    assert (COUNT, RUNS, LAST.get()) == (0, [], None) and not TOTAL.any() and not held.any()


class Picks(nn.Module):
    """What it holds depends on how many rows of the data are positive."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        picked = x[x.sum(1) > 0]
        return self.layer((picked * 2).cos()).square().sum()


def test_a_peak_that_depends_on_the_data_is_bounded_for_data_of_the_kind():
    torch.manual_seed(1)
    model, x = Picks().train(), torch.randn(64, 16)
    kept = x.clone()
    trial = Trial(model, (x,), {}, None)
    of_the_example, bound = trial.peak({}), trial.peak({}, varies=True)
    others = [Trial(model, (torch.randn(64, 16),), {}, None).peak({}) for _ in range(20)]
    assert max(others) > of_the_example and bound > of_the_example
    assert sum(other > bound for other in others) <= 1
    assert trial.peak({}) == of_the_example and torch.equal(x, kept)  # the call's data are as they were


def test_a_peak_that_does_not_is_measured_three_times(monkeypatch):
    trial, draws = Trial(Doubles().train(), (torch.randn(64, 16),), {}, None), []
    draw = trial.step.draw_inputs
    monkeypatch.setattr(trial.step, "draw_inputs", lambda number: (draws.append(number), draw(number)))
    assert trial.peak({}, varies=True) == trial.peak({})
    assert draws == [0, 1, 2, 0]
