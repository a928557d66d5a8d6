"""A planned module out of torch.save, in a process that knows nothing of this one, trains as its eager twin."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planner import plan
from tests import models
from tests.training import assert_same, trajectory

LOAD = """
import sys, torch
from tests.training import trajectory
planned, args, kwargs = torch.load(sys.argv[1], weights_only=False)
assert not planned.difference(args, kwargs)
torch.save((planned.code, trajectory(planned, args, kwargs)), sys.argv[2])
"""


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_torch_save_and_load_in_a_fresh_process(name, tmp_path):
    model, args, kwargs = models.build(name)
    planned = plan(model, 0.9, args, kwargs, costs="estimate", progress=False)
    assert planned.plan.solution.schedule.recomputes()
    saved, trained = tmp_path / "planned.pt", tmp_path / "trained.pt"
    torch.save((planned, args, kwargs), saved)
    run = [sys.executable, "-W", "error", "-c", LOAD, str(saved), str(trained)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    code, found = torch.load(trained)
    assert code == planned.code
    assert_same(trajectory(copy.deepcopy(model), args, kwargs), found)
