"""What stands in a plan's place: eager, where the harness must find no difference; and a model planned by its units."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from planner import NoScheduleFoundError
from planner.composite.planned import PlannedUnits
from planner.composite.units import planned_units
from planner.options import PlanOptions
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


class ByUnits(Itself):
    """A model whose units are planned; their plans are installed in its first call, after which it is compared."""

    def __init__(self, found: PlannedUnits) -> None:
        super().__init__(found.model)
        self._found: PlannedUnits | None = found

    def __call__(self, *args: Any) -> Any:
        if self._found is not None:
            self._found.install()
            self._found = None
        return super().__call__(*args)


def by_units(model: nn.Module, budget: float, args: Any, options: Mapping[str, Any]) -> ByUnits:
    """Stands in for `plan`: every unit is planned on its own, at this fraction of the plain peak or the next that can be."""
    limits = PlanOptions(**{"progress": False, "costs": "estimate", **options})
    for fraction in (budget, (1 + budget) / 2):
        with contextlib.suppress(NoScheduleFoundError):
            return ByUnits(planned_units(model, fraction, args, None, None, limits))
    return ByUnits(planned_units(model, 1.0, args, None, None, limits))


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
