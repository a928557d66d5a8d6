"""plan_units and apply_units: what is checked before the work."""

import pytest
import torch
from torch import nn

from planner import InputError, plan_units
from planner.composite import units as under_test
from planner.composite.trial import Trial


def test_a_fraction_of_an_unknown_peak_is_refused_before_anything_is_captured(monkeypatch):
    monkeypatch.setattr(Trial, "peak", lambda *_: None)  # as where the plain step does not fit on the device
    monkeypatch.setattr(under_test, "kinds_of", None)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    with pytest.raises(InputError, match="a fraction of it is unknown: give bytes"):
        plan_units(model, 0.5, (torch.randn(2, 4),), progress=False)
