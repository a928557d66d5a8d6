"""Equal units as one kind, and units that a step calls otherwise than they were captured."""

import pytest
import torch
from torch import nn

from planner import CaptureError
from planner.composite.kinds import kinds_of
from planner.composite.trial import Trial
from planner.options import PlanOptions

OPTIONS = PlanOptions(costs="estimate", progress=False)


class Block(nn.Module):
    def __init__(self, fills=False):
        super().__init__()
        self.layer, self.scale, self.shift, self.fills = nn.Linear(8, 8), 1.0, None, fills

    def forward(self, x):
        if self.fills:
            if self.shift is None:
                self.shift = torch.ones(8)
            x = x + self.shift
        return x + torch.relu(self.layer(x)) * self.scale


class Net(nn.Module):
    """Writes to an attribute of the first block, before or after it is called."""

    def __init__(self, before=1.0, after=1.0, fills=False):
        super().__init__()
        self.blocks, self.before, self.after = nn.ModuleList([Block(fills), Block(), Block()]), before, after

    def forward(self, x):
        self.blocks[0].scale *= self.before
        for block in self.blocks:
            x = block(x)
        self.blocks[0].scale *= self.after
        return x.square().mean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"before": 2.0}, r"blocks\.0.* scale is 2\.0, planned for 1\.0"),
        ({"after": 2.0}, r"blocks\.0.* scale is 2\.0, planned for 1\.0"),
        (
            {"fills": True},
            r"blocks\.0.* shift is None, planned for .* its first call sets this, run the model once",
        ),
    ],
    ids=["set before the call", "set after the call", "set by the first call"],
)
def test_a_unit_with_python_state_is_left_as_it_is(options, said):
    trial = Trial(Net(**options).train(), (torch.randn(4, 8),), {}, None)
    names = [f"blocks.{k}" for k in range(3)]
    kinds, left = kinds_of(trial, names, OPTIONS, descends=True)
    assert [kind.members for kind in kinds] == [["blocks.1", "blocks.2"]] and list(left) == ["blocks.0"]
    with pytest.raises(CaptureError, match=said):
        kinds_of(trial, names, OPTIONS, descends=False)
    assert trial.model.blocks[0].scale == 1.0 and trial.model.blocks[0].shift is None
    assert not any(module._forward_pre_hooks for module in trial.model.modules())
