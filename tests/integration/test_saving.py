"""A planned module out of torch.save, in a process that knows nothing of this one, trains as its eager twin."""

import copy
import pickle
import subprocess
import sys
from collections import namedtuple

import torch
from torch import nn

from planner import plan
from tests.support import models
from tests.support.paths import ROOT
from tests.support.training import assert_same, trajectory

LOAD = """
import sys, torch
from tests.support.training import trajectory
torch.set_num_threads(int(sys.argv[3]))
found = {}
for name, (planned, args, kwargs) in torch.load(sys.argv[1], weights_only=False).items():
    assert not planned.mismatch(args, kwargs)
    found[name] = planned.code, trajectory(planned, args, kwargs)
torch.save(found, sys.argv[2])
"""


def test_torch_save_and_load_in_a_fresh_process(tmp_path):
    made = {}
    for name in ("attention", "convolution"):
        model, args, kwargs = models.build(name)
        made[name] = plan(model, 0.9, args, kwargs, costs="estimate", progress=False), args, kwargs
        assert made[name][0].plan.solution.schedule.recomputes()
    saved, trained = tmp_path / "planned.pt", tmp_path / "trained.pt"
    torch.save(made, saved)
    run = [sys.executable, "-W", "error", "-c", LOAD, str(saved), str(trained), str(torch.get_num_threads())]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for name, (code, found) in torch.load(trained).items():
        planned, args, kwargs = made[name]
        assert code == planned.code
        assert_same(trajectory(copy.deepcopy(planned.original), args, kwargs), found)


Pair = namedtuple("Pair", ["value", "hidden"])


class MakesPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return Pair(h.sum(), h)


def test_a_pickled_plan_runs_the_calls_of_a_model_that_makes_named_tuples():
    planned, x = plan(MakesPairs(), 1.0, (torch.randn(3, 4),), loss=0, progress=False), torch.randn(3, 4)
    again = pickle.loads(pickle.dumps(planned))
    assert again.mismatch((x,), {}) is None and isinstance(again(x), Pair)
