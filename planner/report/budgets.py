"""Which budgets a sweep looks at."""

from __future__ import annotations

from collections.abc import Sequence

from planner.errors import BudgetError
from planner.units import check_budget, format_bytes, parse_budget

Budget = int | str | float
"""Bytes (int), text ("6GiB"), or a float in (0, 1]: fraction of the plain step's peak."""


def check_budgets(budgets: Sequence[Budget] | None, points: int, low: Budget | None, high: Budget | None) -> None:
    """Raise BudgetError for what no model could give a meaning to, before one is captured."""
    if budgets is not None and (low is not None or high is not None):
        raise BudgetError("give either the budgets, or low and high")
    if isinstance(budgets, (str, bytes, int, float)):
        raise BudgetError(f"budgets={budgets!r}: give a list of budgets; for one budget use plan()")
    if budgets is not None and len(budgets) == 0:
        raise BudgetError("the list of budgets is empty")
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise BudgetError(f"points={points!r}: give the number of budgets, at least 1")
    for budget in (*(budgets or ()), low, high):
        if budget is not None:
            check_budget(budget)


def asked_budgets(
    budgets: Sequence[Budget] | None, points: int, low: Budget | None, high: Budget | None, plain_bytes: int
) -> tuple[int, ...] | None:
    """The budgets in bytes, smallest first; None where `low` is left open.

    Raises:
        BudgetError: unreadable, not positive, empty, `low` above `high`, or above the plain step's peak.
    """
    check_budgets(budgets, points, low, high)
    bounds = [budget for budget in (*(budgets or ()), low, high) if budget is not None]
    for budget in bounds:
        nbytes = parse_budget(budget, plain_bytes)
        if nbytes <= 0:
            raise BudgetError(f"budget {budget!r} is less than a byte of the plain step's {format_bytes(plain_bytes)}")
        if nbytes > plain_bytes:
            raise BudgetError(
                f"budget {format_bytes(nbytes)} is above the plain step's peak of {format_bytes(plain_bytes)} ({plain_bytes} "
                "bytes): from there on nothing is recomputed. End the range there."
            )
    if budgets is not None:
        return tuple(sorted({parse_budget(budget, plain_bytes) for budget in budgets}))
    if low is None:
        return None
    low_bytes, high_bytes = parse_budget(low, plain_bytes), plain_bytes if high is None else parse_budget(high, plain_bytes)
    if low_bytes > high_bytes:
        raise BudgetError(f"the range is empty: low {format_bytes(low_bytes)} is above high {format_bytes(high_bytes)}")
    return spread(low_bytes, high_bytes, points)


def spread(low_bytes: int, high_bytes: int, points: int) -> tuple[int, ...]:
    """So many budgets at equal distances, the largest first chosen: one point is `high_bytes`."""
    steps = max(1, points - 1)
    return tuple(sorted({high_bytes - (high_bytes - low_bytes) * k // steps for k in range(points)}))
