"""The harness itself: eager compared with eager shows nothing, and programs raise only where they are meant to."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.fuzz.generate import case_of
from tests.integration import (
    test_class_carried_state,
    test_class_guards,
    test_class_layouts,
    test_class_left_tensors,
    test_class_random,
    test_class_settings,
    test_class_switches,
)
from tests.support.harness import Different, outcome
from tests.support.source import Program, Step

MEMBERS = [
    *(test_class_carried_state.TENSORS + test_class_carried_state.LATE + test_class_carried_state.ELSEWHERE),
    *test_class_carried_state.NUMBERS,
    *(test_class_left_tensors.LEFT + test_class_left_tensors.ELSEWHERE),
    *(test_class_left_tensors.CACHES + test_class_left_tensors.OUTER_CACHES),
    *(test_class_settings.SCALED + test_class_settings.TYPED + test_class_settings.USED),
    *(test_class_settings.REFUSABLE_PLACES + test_class_settings.changed_modules()),
    *(test_class_switches.switched() + test_class_switches.planned_under()),
    *(test_class_random.TORCH + test_class_random.OTHERS),
    *(test_class_layouts.upstream() + test_class_layouts.weights() + test_class_layouts.written()),
    *(test_class_guards.unexpected() + test_class_guards.arguments()),
]
MEANT_TO_RAISE = (
    "bad_shape",
    "interrupted",
    "written",
    "written_by_autograd",
    "copied",
    "one_at_a_time",
    "partial",
    "last_output",
)


class Itself:
    """Eager in a plan's place."""

    def __init__(self, model):
        self.model, self.plan = model, SimpleNamespace(provenance=None)

    def __call__(self, *args):
        return self.model(*args)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.model, memo)


def itself(model, **_):
    return Itself(model)


@pytest.mark.parametrize("part", range(10))
def test_members_show_nothing_against_themselves(part):
    raised = []
    for of in MEMBERS[part::10]:
        found = outcome(of.program, make=itself)
        assert found.verdict == "same"
        steps = zip(of.program.steps, found.raised, strict=True)
        raised += [(of.name, step.kind, error) for step, error in steps if error and step.kind not in MEANT_TO_RAISE]
    assert not [row for row in raised if row[0] != "a missing layer"]


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_cases_show_nothing_against_themselves(first):
    raised = 0
    for seed in range(first, first + 100):
        found = outcome(case_of(seed).program(), make=itself)
        assert found.verdict == "same", seed
        raised += any(found.raised)
    assert raised <= 25  # a case that raises early tests little


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
