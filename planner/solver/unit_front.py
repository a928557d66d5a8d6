"""The Pareto front of a unit: what it can save for its backward, what it needs beyond that, and what that costs.

A step with units holds, during the backward of one, what all earlier ones saved: a unit's own peak does not limit that. So
each point has both terms. They are found with an op at the end of the forward (`planner.graph.unit_frame`) whose workspace is w
bytes: a budget of what is held around the unit + saved + w then bounds the saved bytes, and the peak by saved + w.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.graph.unit_frame import Frame
from planner.graph.unit_point import Point, point
from planner.limits import Limits
from planner.solver.baselines import fixed_baselines
from planner.solver.solve import Solver
from planner.solver.tuning import GAP

_NUM_SAVED = 16
"""Steps from the least saved bytes to those of the plain step, each of them a limit that is tried: with 8, units took
1.1 points more recompute than a plan of the whole GPT-2 at half its peak, with 16 0.5."""

_NUM_NEEDS = 5
"""Values that are tried for what is needed beyond the saved bytes, beside what the plain step needs."""


def front(graph: Graph, limits: Limits | None = None, *, gap: float = GAP, holds: bool = False) -> tuple[Point, ...]:
    """The Pareto front of a unit's schedules that are found, the fastest first. It holds the plain step, or one as good.

    Args:
        graph: of the unit alone, one forward in flight.
        limits: for all searches together.
        gap: of each search; see `planner.solver.solve.solve`.
        holds: others may need what the unit is given until its backward ends.
    """
    frame = Frame(graph, holds=holds)
    plain = point(graph, keep_all(graph), "keep all", frame)
    found = [plain]
    found += [point(graph, schedule, name, frame) for name, schedule in fixed_baselines(graph)]
    found += [point(graph, s, name, frame) for name, s in _searched(frame, plain, found, limits or Limits(), gap)]
    return pareto(found)


def _needs(frame: Frame) -> tuple[int, ...]:
    """Bytes needed beyond the saved ones, to try, up to what the plain step takes above what is held around the unit."""
    most = max(1, simulate(frame.graph, keep_all(frame.graph)).peak_bytes - frame.around_bytes)
    least = min(most, max(1, (floor(frame.graph)[0] - frame.around_bytes) // 2))
    ratio = max(1.0, most / least) ** (1 / _NUM_NEEDS)
    return tuple(sorted({most, *(round(least * ratio**k) for k in range(_NUM_NEEDS))}))


def _searched(frame: Frame, plain: Point, found: Sequence[Point], limits: Limits, gap: float) -> Iterator[tuple[str, Schedule]]:
    """The cheapest schedules within limits of the saved bytes, for each of a few needs beyond them."""
    least = min(one.saved_bytes for one in found)
    kept = sorted({least + (plain.saved_bytes - least) * k // _NUM_SAVED for k in range(_NUM_SAVED + 1)})
    tried = _needs(frame)
    for need in tried:
        marked = Frame(frame.alone, need, frame.holds)
        budgets = [frame.around_bytes + saved + need for saved in kept]
        outcomes = Solver(marked.graph).sweep(budgets, limits.share(1 / len(tried)), gap=gap)
        for outcome in outcomes.values():
            if isinstance(outcome, Solution):
                yield outcome.solver, marked.without(outcome.schedule)


def pareto(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points that no other one is as good as in every figure; of equal ones the first. The fastest come first."""
    best: list[Point] = []
    for one in sorted(points, key=lambda one: (one.time_ns, one.saved_bytes, one.backward_bytes, one.forward_bytes)):
        if not any(all(a <= b for a, b in zip(other.figures, one.figures, strict=True)) for other in best):
            best.append(one)
    return tuple(best)
