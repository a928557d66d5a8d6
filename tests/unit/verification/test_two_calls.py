"""Two steps of the model itself on an accelerator: what stops them is told apart from a fault of the planner."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planner.errors import GraphError, first_line
from planner.verification import two_calls as module
from planner.verification.two_calls import TwoCalls, two_calls


@pytest.mark.parametrize("error", [GraphError("wrong"), torch.OutOfMemoryError("CUDA out of memory"), ValueError("a model's")])
def test_a_fault_is_no_answer(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, "copy_of", fail)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    joint = SimpleNamespace(absent_device="", device=torch.device("cuda"))
    if isinstance(error, GraphError):
        with pytest.raises(GraphError) as caught:
            two_calls(nn.Linear(1, 1), joint, ((), {}), 0)
        assert "running two steps" in caught.value.__notes__[0]
    else:
        assert two_calls(nn.Linear(1, 1), joint, ((), {}), 0) == TwoCalls(not_run=first_line(error))
