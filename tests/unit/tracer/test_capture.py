import gc

import pytest
import torch
from torch import nn

from planner import CaptureError
from planner.tracer.capture import capture


@pytest.fixture
def collecting():
    was = gc.isenabled()
    yield
    gc.enable() if was else gc.disable()


class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("on purpose")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Fails])
def test_garbage_is_collected_afterwards_as_before(collecting, kind, enabled):
    gc.enable() if enabled else gc.disable()
    try:
        capture(kind(2, 2), (torch.rand(3, 2),))
    except CaptureError:
        assert kind is Fails
    assert gc.isenabled() == enabled
