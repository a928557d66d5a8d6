"""The promise as the operating system sees it: resident memory in a planned step stays at the budget (within 4 MiB)."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from benchmarks.memory import MALLOC_ENVIRONMENT
from planner import plan
from tests.support import models

MIB = 2**20


def stack(name):
    """Models with activations of about 100 MiB."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "attention":
            layers, args = [models.Attention(64, 4, 0.1) for _ in range(6)], (torch.randn(16, 128, 64),)
        else:
            layers = [nn.Conv2d(3, 16, 3, padding=1), *(models.Residual(16) for _ in range(8))]
            args = (torch.randn(8, 3, 64, 64),)
        return models.Wrapped(nn.Sequential(*layers)), args


@pytest.mark.parametrize("name", ["attention", pytest.param("convolution", marks=pytest.mark.zoo)])
def test_the_systems_count_stays_at_the_budget(name, tmp_path):
    model, args = stack(name)
    planned = plan(copy.deepcopy(model), 0.6, args, progress=False)
    assert planned.plan.plain.peak_bytes > 60 * MIB
    pickled = tmp_path / "planned.pickle"
    pickled.write_bytes(pickle.dumps((planned, args)))
    settings = MALLOC_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.physical_worker", str(pickled)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    physical_bytes, budget_bytes = map(int, done.stdout.split())
    assert budget_bytes == planned.plan.budget_bytes
    assert 0.8 * budget_bytes < physical_bytes <= budget_bytes + 4 * MIB
