"""The harness itself: eager compared with eager shows nothing, and programs raise only where they are meant to."""

import pytest
import torch

from tests.support.harness import Different, outcome
from tests.support.itself import Itself
from tests.support.source import Program, Step

CHANGED = {
    "another output": "def call(model, *args):\n    return model(*args) * 1.0000001",
    "a drawn number": "def call(model, *args):\n    torch.rand(1)\n    return model(*args)",
    "an attribute": "def call(model, *args):\n    model.n = 3\n    return model(*args)",
    "a weight": "def call(model, *args):\n    out = model(*args)\n    model.a.bias.data.add_(1)\n    return out",
    "an error": "def call(model, *args):\n    raise RuntimeError('no')",
    "numpy": "def call(model, *args):\n    np.random.rand()\n    return model(*args)",
}


@pytest.mark.parametrize("text", CHANGED.values(), ids=CHANGED)
def test_a_difference_is_found(text):
    home = Program("changed", head=text).load()

    def changed(model, **_):
        module = Itself(model)
        module.model = lambda *args: home.call(model, *args)
        return module

    with pytest.raises(Different):
        outcome(Program("plain", steps=(Step(), Step())), make=changed)


def test_a_trace_of_planning_is_found():
    def leaves(model, **_):
        model.kept = torch.ones(1)
        return Itself(model)

    with pytest.raises(Different, match="planning"):
        outcome(Program("plain"), make=leaves)
