"""plan_children: the former name of plan_units for models whose own forward cannot be captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from planner.analysis.budgets import Budget
from planner.composite.planned import PlannedUnits
from planner.composite.unit_names import LARGEST
from planner.composite.units import planned_units
from planner.errors import warn
from planner.limits import DEFAULT_EFFORT
from planner.options import PlanOptions
from planner.runtime.step import DEFAULT_STAGES
from planner.tracer.loss import Loss


def plan_children(
    model: nn.Module,
    budget: Budget,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss = None,
    costs: Literal["measure", "estimate"] | None = None,
    effort: float = DEFAULT_EFFORT,
    time_limit_s: float | None = None,
    num_stages: int = DEFAULT_STAGES,
    progress: bool = True,
) -> PlannedUnits:
    """Deprecated: `plan_units`, with the largest submodules that can be captured as units, and not yet installed.

    Args:
        model, budget, args, kwargs, loss, costs, effort, time_limit_s, num_stages, progress: as for `plan_units`.

    Returns:
        PlannedUnits; the model is unchanged until its `install()` is called.

    Raises:
        BudgetError, InputError, CaptureError, NoScheduleFoundError: as `plan_units`.
    """
    warn("plan_children is now plan_units, which installs what it plans", DeprecationWarning)
    options = PlanOptions(
        loss=loss, costs=costs, effort=effort, time_limit_s=time_limit_s, num_stages=num_stages, progress=progress
    )
    return planned_units(model, budget, args, kwargs, LARGEST, options, is_whole_captured=False)
