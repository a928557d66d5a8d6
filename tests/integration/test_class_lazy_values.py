"""Plain values that a first call sets: the planned first call sets them, too."""

import copy
import pickle

import pytest
import torch
from torch import nn

from planner import plan
from tests.support.members import check, ids, inside, member

CONFIG = "class Config:\n    def __init__(self):\n        self.mode = None\n"
MODE = "if {0} is None:\n    {0} = 'double'\nh = h * 2 if {0} == 'double' else h * 3"

SET = [
    member("attribute", MODE.format("self.mode"), init="self.mode = None"),
    member("attribute of an object", MODE.format("self.config.mode"), head=CONFIG, init="self.config = Config()"),
    member(
        "attribute of an object in two places",
        MODE.format("self.config.mode"),
        head=CONFIG,
        init="self.config = self.a.config = Config()",
    ),
    member("dictionary item", MODE.format("self.modes['k']"), init="self.modes = {'k': None}"),
    member(
        "dictionary item that is missing",
        "if 'k' not in self.modes:\n    self.modes['k'] = 2.0\nh = h * self.modes['k']",
        init="self.modes = {}",
    ),
    member("attribute that is missing", "if not hasattr(self, 'k'):\n    self.k = 2.0\nh = h * self.k"),
    member("attribute of the class", MODE.format("self.mode"), init="type(self).mode = None"),
    member("list item", MODE.format("self.modes[1]"), init="self.modes = [0, None]"),
    member("shape", "if self.rows is None:\n    self.rows = x.shape\nh = h * self.rows[0]", init="self.rows = None"),
    member("dtype", "if self.kind is None:\n    self.kind = x.dtype\nh = h.to(self.kind)", init="self.kind = None"),
    member(
        "two values",
        "if self.k is None:\n    self.k, self.is_ready = x.shape[-1] ** -0.5, True\nh = h * self.k if self.is_ready else h",
        init="self.k, self.is_ready = None, False",
    ),
    member("global variable", "global MODE\n" + MODE.format("MODE"), head="MODE = None"),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("of", SET, ids=ids(SET))
def test_the_first_call_runs_planned(of):
    check(of)


@pytest.mark.parametrize("of", SET[::3], ids=ids(SET[::3]))
def test_the_first_call_runs_planned_in_a_submodule(of):
    check(inside(of))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)
        self.settings = {"mode": None}

    def forward(self, x):
        if self.settings["mode"] is None:
            self.settings["mode"] = "one" if x.shape[0] == 1 else "many"
        h = torch.tanh(self.a(x)).exp()
        return self.b(h.sum(0) if self.settings["mode"] == "many" else h * 2).sum()


def planned_net():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    return plan(Net(), 1.0, (x,), costs="estimate", progress=False), x


def test_a_question_leaves_the_value_unset():
    planned, x = planned_net()
    assert planned.mismatch((x,), {}) is None
    assert planned.original.settings == {"mode": None}


def test_another_call_leaves_the_value_to_the_model():
    planned, _ = planned_net()
    x = torch.randn(1, 8)
    with pytest.warns(UserWarning, match=r"input 0 is .*\[1, 8\]"):
        out = planned(x)
    assert planned.original.settings == {"mode": "one"}
    assert torch.equal(out, planned.original(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"])
def test_copies_run_their_first_call_planned(copied):
    planned, x = planned_net()
    other = copied(planned)
    out = other(x)
    assert other.num_unplanned_calls == 0
    assert other.original.settings == {"mode": "many"} and planned.original.settings == {"mode": None}
    assert torch.equal(out, planned.original(x))


def test_a_value_that_was_set_otherwise_is_a_mismatch():
    planned, x = planned_net()
    planned.original.settings["mode"] = "one"
    assert "planned for 'many'" in str(planned.mismatch((x,), {}))
