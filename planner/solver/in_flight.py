"""Several forwards before the first backward, as in the stages of a pipeline.

With n in flight, what a schedule saves (s bytes) counts n - 1 times beside its own peak p: p + (n - 1) s <= budget. The
solver's strategies know one bound alone, that of the peak. But an op at the end of the forward that takes no time and has a
workspace of w bytes makes a peak of b a bound of the saved bytes, too: s <= b - resident - w. So for each of a few
workspaces w,

- what keeps p <= b and s <= b - resident - w, with n b = budget + (n - 1) (resident + w), fits: p + (n - 1) s <= budget;
- every schedule that fits and has p - resident - s between two workspaces v < w has s <= (budget - resident - v) / n =: c and
  p <= resident + c + w, which is a peak of resident + c + w with workspace w: its bound holds for these schedules.

The least of these bounds holds for all schedules, and the best of these schedules is the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.floor import floor
from planner.graph.graph import Graph, Op
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline, simulate
from planner.graph.solution import Solution
from planner.limits import Limits

_NUM_WORKSPACES = 5
"""Workspaces that are tried between the least and the most that makes sense; each costs two searches."""

Outcome = Solution | InfeasibleBudgetError | NoScheduleFoundError
"""Of the search for one budget: a schedule, or why there is none."""


class OneSolver(Protocol):
    """The solver of a graph with one forward in flight (`planner.solver.solve.Solver`)."""

    def sweep(self, budgets_bytes: Iterable[int], limits: Limits | None = None, *, gap: float = ...) -> dict[int, Outcome]:
        """A solution, or why there is none, for every budget."""

    def lowest(self, limits: Limits | None = None) -> Schedule:
        """The schedule with the lowest peak that is found."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best schedule within a budget, None where none was found; and the bound, None where nothing can fit."""

    schedule: Schedule | None
    source: str
    bound_ns: int | None
    work: float
    solve_s: float
    limit: str


def with_saved_limit(graph: Graph, workspace_bytes: int) -> Graph:
    """The graph with one forward in flight, and at the end of its forward an op that takes no time and has this workspace."""
    end = graph.num_forward_ops
    hold = Op("(saved)", (), (), (), 0, workspace_bytes, recomputable=False)
    return replace(graph, ops=(*graph.ops[:end], hold, *graph.ops[end:]), num_forward_ops=end + 1, in_flight=1)


def without_saved_limit(schedule: Schedule, graph: Graph) -> Schedule:
    """A schedule of `with_saved_limit(graph, ...)` as one of `graph`."""
    end = graph.num_forward_ops
    return Schedule(tuple(i - (i > end) for i in schedule.steps if i != end))


def workspaces(graph: Graph) -> tuple[int, ...]:
    """Workspaces to try, in bytes, smallest first: from nothing to what the plain step takes above its resident bytes."""
    alone = replace(graph, in_flight=1)
    most = max(1, simulate(alone, keep_all(alone)).peak_bytes - graph.resident_bytes)
    least = max(1, (floor(alone)[0] - graph.resident_bytes) // 2)
    ratio = max(1.0, most / least) ** (1 / _NUM_WORKSPACES)
    return tuple(sorted({0, most, *(round(least * ratio**k) for k in range(_NUM_WORKSPACES))}))


def find(graph: Graph, budget_bytes: int, limits: Limits, gap: float, solver_of: Callable[[Graph], OneSolver]) -> Found:
    """The fastest schedule found with p + (n - 1) s within the budget, and a bound for all that are.

    Args:
        graph: with n forwards in flight.
        budget_bytes: for p + (n - 1) s.
        limits: for all searches together.
        gap: of each search; see `planner.solver.solve.solve`.
        solver_of: makes the solver of a graph with one forward in flight.
    """
    asked = list(_searches(graph, budget_bytes))
    best: tuple[Timeline, Schedule, str] | None = None
    bounds: list[int] = []
    work, solve_s, limit = 0.0, 0.0, ""
    for workspace, within, bounding in asked:
        share = limits.share(1 / len(asked))
        budgets = [nbytes for nbytes in (within, bounding) if nbytes is not None]
        found = solver_of(with_saved_limit(graph, workspace)).sweep(budgets, share, gap=gap)
        for outcome in found.values():
            if not isinstance(outcome, Solution):
                continue
            work, solve_s, limit = work + outcome.work, solve_s + outcome.solve_s, limit or outcome.limit
            schedule = without_saved_limit(outcome.schedule, graph)
            timeline = simulate(graph, schedule)
            if timeline.peak_bytes <= budget_bytes and (best is None or timeline.time_ns < best[0].time_ns):
                best = timeline, schedule, outcome.solver
        if bounding is not None and not isinstance(found[bounding], InfeasibleBudgetError):
            outcome = found[bounding]
            bounds.append(outcome.bound_ns if isinstance(outcome, Solution) else graph.plain_ns)
    bound = min(bounds, default=None)
    return Found(None if best is None else best[1], "" if best is None else best[2], bound, work, solve_s, limit)


def _searches(graph: Graph, budget_bytes: int) -> Iterator[tuple[int, int | None, int | None]]:
    """(workspace, peak within which a schedule fits the budget, peak whose bound holds between this workspace and the last)."""
    n, resident = graph.in_flight, graph.resident_bytes
    before: int | None = None
    for workspace in workspaces(graph):
        within = (budget_bytes + (n - 1) * (resident + workspace)) // n
        saved = None if before is None else (budget_bytes - resident - before) // n
        bounding = None if saved is None or saved < 0 else min(budget_bytes, resident + saved + workspace)
        yield workspace, within if within >= resident + workspace else None, bounding
        before = workspace
    assert before is not None
    saved = (budget_bytes - resident - before) // n
    if saved >= 0:  # and beyond the largest workspace
        yield max(0, budget_bytes - resident - saved), None, budget_bytes


def lowest(graph: Graph, limits: Limits, solver_of: Callable[[Graph], OneSolver]) -> Schedule:
    """The schedule with the lowest p + (n - 1) s that is found: of those with the lowest peak for each workspace."""
    tried = workspaces(graph)
    found = [
        without_saved_limit(solver_of(with_saved_limit(graph, workspace)).lowest(limits.share(1 / len(tried))), graph)
        for workspace in tried
    ]
    return min(found, key=lambda schedule: simulate(graph, schedule).peak_bytes)
