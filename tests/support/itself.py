"""Eager in a plan's place: the harness must find no difference between a model and itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from torch import nn

from tests.support.harness import outcome
from tests.support.members import Member

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
"""Kinds of steps in which eager may raise."""


class Itself:
    """A model where a planned module is expected."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.plan = model, SimpleNamespace(provenance=None)

    def __call__(self, *args: Any) -> Any:
        return self.model(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return copy.deepcopy(self.model, memo)


def itself(model: nn.Module, **_: Any) -> Itself:
    """Stands in for `plan`."""
    return Itself(model)


def check_against_itself(members: Iterable[Member]) -> None:
    """Run every member by eager on both sides.

    Raises:
        AssertionError: a difference was found, or a program raises in a step that is not meant to.
    """
    raised = []
    for of in members:
        found = outcome(of.program, make=itself)
        assert found.verdict == "same", f"{of.name}: {found}"
        steps = zip(of.program.steps, found.raised, strict=True)
        raised += [(of.name, step.kind, error) for step, error in steps if error and step.kind not in MEANT_TO_RAISE]
    assert not [row for row in raised if row[0] != "a missing layer"]
