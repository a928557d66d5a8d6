"""Why a call does not run planned: facts with fields. What is done about one is decided by them, never by their text."""

from __future__ import annotations

import warnings
from typing import get_args

import pytest
import torch
from torch import nn

from planner import MismatchWarning, plan
from planner.runtime.guards.mismatch import Mismatch, MismatchKind
from planner.tracer.host.fingerprint import Fingerprints, first_difference
from planner.tracer.host.values import ABSENT

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def absent(x):
    """An activation whose name is also a word of messages."""
    return torch.tanh(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.activation = nn.Linear(8, 8), 2.0, torch.relu

    def forward(self, x, shift=0.0):
        if not hasattr(self, "mask"):
            self.mask = torch.ones(8)
        return self.activation(self.layer(x)) * self.scale * self.mask + shift


def made():
    torch.manual_seed(0)
    model = Net().train()
    model(X)
    return model, plan(model, 1.0, (X,), costs="estimate", progress=False)


@pytest.mark.parametrize(
    ("kind", "change", "args"),
    [
        ("input", None, (X[:2],)),
        ("argument", None, (X, 1.0)),
        ("argument", None, ([X],)),
        ("weight", lambda m: m.layer.double(), (X,)),
        ("host", lambda m: setattr(m, "scale", 3.0), (X,)),
        ("host", lambda m: setattr(m, "activation", absent), (X,)),
        ("host", lambda m: delattr(m, "mask"), (X,)),
        ("mode", lambda m: m.eval(), (X,)),
        ("module", lambda m: setattr(m, "layer", nn.Linear(8, 8)), (X,)),
        ("module", lambda m: m.layer.register_forward_hook(lambda *_: None), (X,)),
    ],
)
def test_every_mismatch_has_its_kind(kind, change, args):
    model, planned = made()
    assert planned.mismatch((X,), {}) is None
    if change is not None:
        change(model)
    found = planned.mismatch(args, {})
    assert isinstance(found, Mismatch) and found.kind == kind and kind in get_args(MismatchKind), found


def warned(change):
    """The warning of a planned call after a change."""
    model, planned = made()
    change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned(X)
    (one,) = (str(warning.message) for warning in caught if warning.category is MismatchWarning)
    return one


def test_state_that_the_first_call_makes_has_a_cure_and_a_function_called_absent_has_none():
    cure = "run the model once before planning"
    assert cure in warned(lambda m: delattr(m, "mask"))
    message = warned(lambda m: setattr(m, "activation", absent))
    assert "activation is absent, planned for " in message and cure not in message


def test_a_difference_says_what_is_there_and_whether_anything_is():
    prints = Fingerprints({}, lambda _, __: True)
    gone = first_difference(prints.of(2.0), prints.of(ABSENT), "body.scale")
    assert (gone.where, gone.planned, gone.now, gone.is_absent) == ("body.scale", "2.0", "absent", True)
    other = first_difference(prints.of({"a": (1, 2)}), prints.of({"a": (1, 3)}), "config")
    assert (other.where, other.planned, other.now, other.is_absent) == ("config['a'][1]", "2", "3", False)
    named = first_difference(prints.of(torch.relu), prints.of(absent), "activation")
    assert (named.now, named.is_absent) == ("absent", False)


@pytest.mark.parametrize(
    ("miss", "text"),
    [
        (Mismatch("host", "body.scale", "3.0", "2.0"), "body.scale is 3.0, planned for 2.0"),
        (Mismatch("mode", "grad mode", "disabled"), "grad mode is disabled"),
        (Mismatch("argument", "the structure of the arguments"), "the structure of the arguments differs"),
    ],
)
def test_a_mismatch_is_printed_with_what_is_known(miss, text):
    assert str(miss) == text


def test_autocast_is_named_by_its_dtype():
    _, planned = made()
    with torch.autocast("cpu", torch.bfloat16):
        found = planned.mismatch((X,), {})
    assert (found.kind, found.where, found.now, found.planned) == ("mode", "autocast", "to bfloat16", "off")
