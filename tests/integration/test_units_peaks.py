"""The predicted peak of a step with planned units is the measured one, whatever each of them recomputes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planner import NoScheduleFoundError, plan, plan_units
from planner.composite.kinds import kinds_of
from planner.composite.search import UnitSearch
from planner.composite.trial import Trial
from planner.limits import Limits
from planner.options import PlanOptions
from planner.profiled import profiled

ROWS, WIDTH = 512, 64


class Feed(nn.Module):
    """Its gradient is last read at its end, where the residual joins."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Activated(Feed):
    """Its gradient, and its output, are read by the first kernel of the backward alone."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Tanh(Activated):
    """The backward reads what it returns."""

    def forward(self, x):
        return torch.tanh(self.down(torch.sigmoid(self.up(self.norm(x)))))


class Outside(Feed):
    """The residual is outside: others hold its input, and its gradient."""

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))


class Two(Feed):
    """Two inputs and two outputs of equal bytes."""

    def forward(self, x, memory):
        h = torch.relu(self.down(F.gelu(self.up(self.norm(x)))) + memory)
        return torch.tanh(h + x), torch.sigmoid(memory * h)


class Passes(Two):
    """Returns one of its inputs, whose gradient the whole graph sums up between the unit's ops."""

    def forward(self, x, memory):
        return torch.tanh(self.down(F.gelu(self.up(self.norm(x)))) * memory), memory


class Norm(Feed):
    """A part of it is called from outside, too."""

    def forward(self, x):
        return torch.tanh(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        x = self.first(x)
        if isinstance(self.blocks[0], Two):
            memory = torch.sin(x)
            for block in self.blocks:
                x, memory = block(x, memory)
            x = x + memory
        else:
            for block in self.blocks:
                around = x if type(block) is Outside else block.norm(x) if type(block) is Norm else None
                x = block(x) if around is None else around + block(x)
        return self.head(x).square().mean()


def reads_what_it_is_given(graph, schedule):
    """A backward that reads of its inputs and outputs what the plain one reads, and makes no output again.

    Of others, the composed graph holds these until the backward begins.
    """
    own = {*graph.inputs, *graph.forward_outputs}
    plain = {name for i in graph.backward_ops for name in graph.ops[i].reads} & own
    steps = schedule.steps[schedule.boundary(graph) :]
    read = {name for i in steps for name in graph.ops[i].reads}
    again = {name for t in schedule.recomputes() for name in graph.ops[schedule.steps[t]].writes}
    return plain <= read and not again & own


@pytest.mark.parametrize("block", [Feed, Activated, Tanh, Outside, Two, Passes, Norm])
@pytest.mark.parametrize("num_stages", [1, 4])
def test_a_prediction_is_what_is_measured(block, num_stages):
    torch.manual_seed(0)
    model, args = Stack(block), (torch.randn(ROWS, WIDTH),)
    options = PlanOptions(progress=False, num_stages=num_stages)
    whole = profiled(model, args, {}, options)
    trial = Trial(model, args, {}, None)
    kinds, left = kinds_of(trial, [f"blocks.{k}" for k in range(3)], options, descends=False)
    assert len(kinds) == 1 and not left
    search = UnitSearch(trial, kinds, Limits(1.0), whole.graph)
    assert not search.outer.is_measured
    last = min(map(len, search.fronts.values())) - 1
    assert last >= 2
    for positions in [*((at, at, at) for at in range(0, last + 1, max(1, last // 4))), (0, last, 0), (last, 0, last // 2)]:
        choice = dict(zip(search.fronts, positions, strict=True))
        predicted, measured = search.predicted_bytes(choice), trial.peak(search.made(choice))
        if not search.outer.held and all(
            reads_what_it_is_given(kinds[0].graph, search.fronts[unit][at].schedule) for unit, at in choice.items()
        ):
            assert predicted == measured, positions
        assert predicted >= measured, positions
    assert bool(search.outer.held) is (block in (Passes, Norm))


def test_the_gradient_of_a_unit_is_freed_after_its_last_read():
    """`Activated` needs it no more once the activation's backward has run; a plan for less than with it held is made."""
    torch.manual_seed(0)
    units = plan_units(Stack(Activated), 0.8, (torch.randn(ROWS, WIDTH),), progress=False)
    assert units.plan.measured_bytes == units.plan.peak_bytes <= units.plan.budget_bytes


def test_where_units_hand_on_most_of_it_the_whole_model_is_the_cure():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(12)]
    model, x = nn.Sequential(*blocks, nn.Linear(32, 1)), torch.randn(4096, 32)
    with pytest.raises(NoScheduleFoundError, match=r"bytes\), or reduce the batch\. Or plan the whole model by planner\.plan"):
        plan_units(model, 0.5, (x,), progress=False)
    assert plan(model, 0.5, (x,), progress=False).plan.measured_bytes is not None
    with pytest.raises(NoScheduleFoundError, match=r"bytes\), or reduce the batch\.$"):
        plan_units(model, 0.05, (x,), progress=False)
