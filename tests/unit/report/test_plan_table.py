"""What the table of a plan says of the call that it was made of."""

import pytest
import torch
from torch import nn

from planner import Plan, plan


class Net(nn.Module):
    def __init__(self, outputs) -> None:
        super().__init__()
        self.body, self.outputs = nn.Linear(4, 4), outputs

    def forward(self, x):
        return self.outputs(self.body(x))


CASES = {
    "": lambda h: h.mean(),
    "from the output loss": lambda h: {"logits": h, "loss": h.mean()},
    "from the output [1]": lambda h: (h.detach(), h.square()),
    "from the outputs [0], [1] (loss=... chooses one)": lambda h: (h, h.square()),
    "from the outputs [0], [1], [2], [3], 2 more (loss=... chooses one)": lambda h: tuple(h * i for i in range(6)),
}


@pytest.mark.parametrize("said", CASES)
def test_where_backward_starts(said, tmp_path):
    made = plan(Net(CASES[said]), 1.0, (torch.randn(2, 4),), progress=False, costs="estimate").plan
    made.save(tmp_path / "plan.json")
    for text in (str(made), str(Plan.load(tmp_path / "plan.json"))):
        rows = [line.removeprefix("backward").strip() for line in text.splitlines() if line.startswith("backward ")]
        assert rows == ([said] if said else [])
