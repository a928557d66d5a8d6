"""Bytes that opaque modules hold in a step: predicted peaks are the measured ones, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import plan
from planner.graph.simulate import simulate


class Net(nn.Module):
    """A recurrent module; `pick` chooses what the loss reads of its output."""

    def __init__(self, core: nn.Module, width: int, pick) -> None:
        super().__init__()
        self.before, self.core, self.after, self.pick = nn.Linear(8, 16), core, nn.Linear(width, 1), pick

    def forward(self, x):
        return torch.cat([self.after(out) for out in self.pick(self.core(self.before(x)))]).mean()


class Residual(nn.Module):
    """The core's argument has a gradient already when the core's backward begins."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 16), nn.Linear(16, 1)
        self.core = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.core.register_forward_hook(lambda *_: None)

    def forward(self, x):
        hidden = self.before(x)
        return self.after(hidden + self.core(hidden)).mean()


CASES = {
    "gru": lambda: Net(nn.GRU(16, 16), 16, lambda out: (out[0],)),
    "gru, layers, both ways": lambda: Net(nn.GRU(16, 16, 2, bidirectional=True, batch_first=True), 32, lambda out: (out[0],)),
    "lstm": lambda: Net(nn.LSTM(16, 16), 16, lambda out: (out[0],)),
    "lstm, last state": lambda: Net(nn.LSTM(16, 16, 2), 16, lambda out: (out[1][0],)),
    "rnn, both results": lambda: Net(nn.RNN(16, 16, 2), 16, lambda out: out),
    "a hook": Residual,
}


def predicted_and_measured(make, *, autocast: bool = False):
    torch.manual_seed(0)
    model, x = make(), torch.randn(6, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = plan(model, 1.0, (x,), progress=False, costs="estimate").plan
    timeline = simulate(made.graph, made.solution.schedule)
    assert made.graph.ops[made.solution.schedule.steps[timeline.peak_step]].kernel.startswith("planner.part")
    return made.peak_bytes, made.measured_bytes


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", CASES)
def test_the_peak_in_an_opaque_module_is_as_predicted(name):
    predicted, measured = predicted_and_measured(CASES[name])
    assert predicted == measured


def test_under_autocast_as_well():
    predicted, measured = predicted_and_measured(CASES["gru"], autocast=True)
    assert predicted == measured
