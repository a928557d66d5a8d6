"""Which budgets a sweep looks at, and which budget to name where one has no plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.analysis.margin import smallest_budget
from planner.errors import BudgetError, CaptureError, InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.floor import infeasible_text
from planner.solver.solve import not_found_text
from planner.units import MOST_BYTES, check_budget, enough_text, format_bytes, kind, parse_budget, shown

Budget = int | str | float
"""Bytes (int), text ("6GiB"), or a fraction of the plain step's peak (0.6 or "60%")."""


_MOST_POINTS = 10_000

Refusal = InfeasibleBudgetError | NoScheduleFoundError
"""Why a budget has no plan."""


def restated(
    error: Refusal,
    budget: str,
    budget_bytes: int,
    margin: Callable[[int], int],
    lowest_bytes: int | None = None,
    plain_bytes: int | None = None,
    *,
    is_least_batch: bool = False,
    others_need: int = 0,
) -> Refusal:
    """A solver's refusal in the user's terms: the budget as it was given, and one that can be met, margin included.

    Args:
        error: raised for `budget_bytes - margin(budget_bytes)`.
        budget: what was asked for, in words.
        margin: see `smallest_budget`.
        lowest_bytes: the lowest peak that is known to be reached.
        plain_bytes: of which the budget was given as a fraction; None where it was given in bytes.
        is_least_batch: the model runs no smaller one.
        others_need: bytes of a budget that holds the other calls that are planned together with this one.
    """
    free = margin(budget_bytes)
    needed = error.floor_bytes if isinstance(error, InfeasibleBudgetError) else error.lowest_bytes or 0
    if free and budget_bytes >= needed:
        part = "of which" if free < budget_bytes else "of which it would take more, as"
        budget = f"{budget}, {part} {format_bytes(free)} are left free for the allocator,"
    if isinstance(error, InfeasibleBudgetError):
        own = smallest_budget(max(error.floor_bytes, lowest_bytes or 0), margin)
        enough, why = max(own, others_need), ", which another call of also= or sizes= needs" if others_need > own else ""
        cure = f"Raise the budget to {enough_text(enough)} ({enough} bytes){_as_fraction(enough, plain_bytes)}{why}"
        message = infeasible_text(f"budget {budget}", error.floor_bytes, error.culprit, cure, error.advice)
        return InfeasibleBudgetError(
            message,
            budget_bytes=budget_bytes,
            floor_bytes=error.floor_bytes,
            culprit=error.culprit,
            advice=error.advice,
        )
    lowest = min(known for known in (error.lowest_bytes, lowest_bytes, MOST_BYTES) if known is not None)
    enough = max(smallest_budget(lowest, margin), others_need)
    message = not_found_text(budget, lowest, error.floor_bytes, error.solve_s, enough, is_least_batch=is_least_batch)
    return NoScheduleFoundError(message, lowest_bytes=lowest, floor_bytes=error.floor_bytes, solve_s=error.solve_s)


def size_refused(error: CaptureError, budget_bytes: int, need_bytes: int) -> CaptureError:
    """The error for a call of `sizes=`; where the budget is too small for some of them, with one that holds them all."""
    if need_bytes <= budget_bytes:
        return error
    return CaptureError(
        f"Raise the budget to {enough_text(need_bytes)} ({need_bytes} bytes), which the calls of also= and sizes= need: in "
        f"{format_bytes(budget_bytes)} a call of sizes= cannot be planned"
    )


def _as_fraction(nbytes: int, plain_bytes: int | None) -> str:
    """A budget as a fraction of the plain peak to type in, rounded up; "" where it is none, or no fraction was asked for."""
    thousandths = -(-1000 * nbytes // plain_bytes) if plain_bytes else 1001
    return f", {thousandths / 1000:g} of the plain step's peak" if thousandths <= 1000 else ""


def check_budgets(budgets: Sequence[Budget] | None, points: int, low: Budget | None, high: Budget | None) -> None:
    """Raise BudgetError for arguments that are invalid for every model, before one is captured."""
    if budgets is not None and (low is not None or high is not None):
        raise BudgetError("give either the budgets, or low and high")
    if budgets is not None and (not isinstance(budgets, Sequence) or isinstance(budgets, (str, bytes))):
        raise BudgetError(f"budgets= is {kind(budgets)}: give a list of budgets; for one budget use plan()")
    if budgets is not None and len(budgets) == 0:
        raise BudgetError("the list of budgets is empty")
    if isinstance(points, bool) or not isinstance(points, int) or not 1 <= points <= _MOST_POINTS:
        raise BudgetError(f"points={shown(points)}: give the number of budgets, at least 1 and at most {_MOST_POINTS}")
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
            raise BudgetError(f"budget {shown(budget)} is less than a byte of the plain step's {format_bytes(plain_bytes)}")
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
    """`points` budgets at equal distances, the largest chosen first: one point is `high_bytes`."""
    steps = max(1, points - 1)
    return tuple(sorted({high_bytes - (high_bytes - low_bytes) * k // steps for k in range(points)}))
