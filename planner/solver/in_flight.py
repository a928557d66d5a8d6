"""Several forwards before the first backward, as in the stages of a pipeline.

With n in flight, what a schedule saves (s bytes) counts n - 1 times beside its own peak p: p + (n - 1) s <= budget. The
solver's strategies bound the peak only. But an op at the end of the forward that takes no time and has a workspace of w bytes
makes a peak of b a bound of the saved bytes, too: s <= b - resident - w. Let t = p - resident - s, what a schedule needs beyond
what it saves. For each of a few t:

- what keeps p <= b and s <= b - resident - t, with n b = budget + (n - 1) (resident + t), fits: p + (n - 1) s <= budget;
- every schedule that fits and needs between t' and t has s <= c := (budget - resident - t') / n, and p <= min(budget,
  resident + c + t): no schedule within these two bounds is faster than the bound that the solver proves for them.

The least of these bounds holds for all schedules, and the best of the schedules that fit is the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.floor import floor
from planner.graph.graph import Graph, Op
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits

_NUM_NEEDS = 5
"""Values of t that are tried between the least and the most that makes sense; each costs two searches."""

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


def needs(graph: Graph) -> tuple[int, ...]:
    """Values of t to try, in bytes, smallest first: from nothing to what the plain step takes above its resident bytes."""
    alone = replace(graph, in_flight=1)
    most = max(1, simulate(alone, keep_all(alone)).peak_bytes - graph.resident_bytes)
    least = max(1, (floor(alone)[0] - graph.resident_bytes) // 2)
    ratio = max(1.0, most / least) ** (1 / _NUM_NEEDS)
    return tuple(sorted({0, most, *(round(least * ratio**k) for k in range(_NUM_NEEDS))}))


def find(graph: Graph, budget_bytes: int, limits: Limits, gap: float, solver_of: Callable[[Graph], OneSolver]) -> Found:
    """The fastest schedule found with p + (n - 1) s within the budget, and a bound for all that are.

    Args:
        graph: with n forwards in flight.
        budget_bytes: for p + (n - 1) s.
        limits: for all searches together.
        gap: of each search; see `planner.solver.solve.solve`.
        solver_of: makes the solver of a graph with one forward in flight.
    """
    tried = needs(graph)
    fitting, bounding = fitting_limits(graph, budget_bytes, tried), bounding_limits(graph, budget_bytes, tried)
    asked: dict[int, list[int]] = {}
    for workspace, peak in (*fitting, *bounding):
        asked.setdefault(workspace, []).append(peak)
    best: tuple[int, Schedule, str] | None = None
    bounds: list[int] = []
    work, solve_s, limit = 0.0, 0.0, ""
    for workspace, peaks in asked.items():
        found = solver_of(with_saved_limit(graph, workspace)).sweep(peaks, limits.share(1 / len(asked)), gap=gap)
        for peak, outcome in found.items():
            if (workspace, peak) in bounding and not isinstance(outcome, InfeasibleBudgetError):
                bounds.append(outcome.bound_ns if isinstance(outcome, Solution) else graph.plain_ns)
            if not isinstance(outcome, Solution):
                continue
            work, solve_s, limit = work + outcome.work, solve_s + outcome.solve_s, limit or outcome.limit
            schedule = without_saved_limit(outcome.schedule, graph)
            timeline = simulate(graph, schedule)
            if timeline.peak_bytes <= budget_bytes and (best is None or timeline.time_ns < best[0]):
                best = timeline.time_ns, schedule, outcome.solver
    schedule_found, source = (None, "") if best is None else best[1:]
    return Found(schedule_found, source, min(bounds, default=None), work, solve_s, limit)


def fitting_limits(graph: Graph, budget_bytes: int, tried: Sequence[int]) -> list[tuple[int, int]]:
    """(workspace, peak) for `with_saved_limit`: every schedule within one of these fits the budget."""
    n, resident = graph.in_flight, graph.resident_bytes
    peaks = [(t, (budget_bytes + (n - 1) * (resident + t)) // n) for t in tried]
    return [(t, peak) for t, peak in peaks if peak >= resident + t]


def bounding_limits(graph: Graph, budget_bytes: int, tried: Sequence[int]) -> list[tuple[int, int]]:
    """(workspace, peak) for `with_saved_limit`: every schedule that fits the budget is within one of these."""
    resident, limits = graph.resident_bytes, []
    for low, high in pairwise((*tried, budget_bytes)):
        saved = (budget_bytes - resident - low) // graph.in_flight
        if saved >= 0:
            peak = min(budget_bytes, resident + saved + high)
            limits.append((peak - resident - saved, peak))
    return limits


def lowest(graph: Graph, limits: Limits, solver_of: Callable[[Graph], OneSolver]) -> Schedule:
    """The schedule with the lowest p + (n - 1) s that is found: of those with the lowest peak for each value of t."""
    tried = needs(graph)
    found = [
        without_saved_limit(solver_of(with_saved_limit(graph, t)).lowest(limits.share(1 / len(tried))), graph) for t in tried
    ]
    return min(found, key=lambda schedule: simulate(graph, schedule).peak_bytes)
