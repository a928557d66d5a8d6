"""The cheapest schedule within a budget: coarsen, solve the program, expand, simulate, certify."""

from __future__ import annotations

import time
from collections.abc import Callable

from planner.errors import NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.plan import Solution
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline, simulate
from planner.solver.backend import solver_name
from planner.solver.baselines import all_baselines
from planner.solver.bound import lower_bound
from planner.solver.closure import Closure
from planner.solver.coarsen import Coarse, coarsen, expand, uncoarsened
from planner.solver.floor import floor, infeasible
from planner.units import format_bytes

__all__ = ["floor", "lowest_peak", "solve"]

_SEARCH_SHARE = 0.7
"""Part of the time limit for finding a schedule; the rest is for low peaks and the certificate."""
_CERTIFICATE_S = 1.0
"""A good bound comes soon or late: equal blocks make the last tenth of a percent slow to prove."""

_SECOND_LOOK_S = 1.0
_SECOND_LOOK_GAPS = 4
"""For the uncoarsened program, where the certificate leaves more than this many gaps open."""


def solve(graph: Graph, budget_bytes: int, *, time_limit_s: float = 10.0, gap: float = 0.0005) -> Solution:
    """The cheapest schedule found whose simulated peak on `graph` is within the budget.

    Args:
        graph: the joint graph; the budget holds everything live on the device.
        budget_bytes: bound on the live bytes at every step.
        time_limit_s: wall seconds for search and certificate together.
        gap: how far from the optimum to stop, as a fraction of the plain step's time.

    Raises:
        InfeasibleBudgetError: proven: some op needs more than the budget while it runs.
        NoScheduleFoundError: nothing was found in the time given.
        SolverMissingError: neither HiGHS nor CBC can be run.
    """
    start = time.monotonic()
    best = _Best(graph, budget_bytes)
    plain = best.offer(keep_all(graph), "keep all")
    if best.timeline is not None:
        return Solution("optimal", best.schedule, plain.time_ns, time.monotonic() - start, best.solver)
    if floor(graph)[0] > budget_bytes:
        raise infeasible(graph, budget_bytes)
    deadline = start + _SEARCH_SHARE * time_limit_s
    coarse = coarsen(graph)
    exact = _search(best, coarse, deadline, gap)
    bound_ns = _certify(best, start + time_limit_s, gap) if best.timeline else 0
    if best.timeline is None or best.timeline.time_ns - bound_ns > _SECOND_LOOK_GAPS * gap * plain.time_ns:
        if len(coarse.groups) < len(graph.ops):
            # Merged ops hold their inputs a little longer than they must: look again without merging.
            exact |= _search(best, uncoarsened(graph), min(deadline, time.monotonic() + _SECOND_LOOK_S), gap)
        best.offer_baselines()
    if best.timeline is None:
        _lower_peak(best, start + time_limit_s)
    if best.timeline is None:
        raise NoScheduleFoundError(_failure(best, time.monotonic() - start))
    bound_ns = bound_ns or _certify(best, start + time_limit_s, gap)
    time_ns = best.timeline.time_ns
    if bound_ns > time_ns:  # contradicted by the schedule at hand: numerical trouble, so claim nothing
        bound_ns = plain.time_ns
    status = "optimal" if exact or time_ns - bound_ns <= gap * plain.time_ns else "feasible"
    return Solution(status, best.schedule, bound_ns, time.monotonic() - start, best.solver)


def lowest_peak(graph: Graph, *, time_limit_s: float = 10.0) -> int:
    """The lowest peak, in bytes, of any schedule this solver finds: a budget that `solve` can meet."""
    best = _Best(graph, 0)
    best.offer(keep_all(graph), "keep all")
    _lower_peak(best, time.monotonic() + time_limit_s)
    return best.lowest_bytes


class _Best:
    """The cheapest schedule that fits, and the lowest peak among all that were offered."""

    schedule: Schedule = Schedule(())
    timeline: Timeline | None = None
    solver: str = ""
    lowest_bytes: int = 2**63 - 1

    def __init__(self, graph: Graph, budget_bytes: int) -> None:
        self.graph, self.budget_bytes = graph, budget_bytes

    def offer(self, schedule: Schedule, solver: str) -> Timeline:
        """Simulate a schedule of the original graph, the only judgement that counts."""
        timeline = simulate(self.graph, schedule)
        self.lowest_bytes = min(self.lowest_bytes, timeline.peak_bytes)
        if timeline.peak_bytes <= self.budget_bytes and (self.timeline is None or timeline.time_ns < self.timeline.time_ns):
            self.schedule, self.timeline, self.solver = schedule, timeline, solver
        return timeline

    def judge(self, coarse: Coarse) -> Callable[[Schedule], Timeline]:
        """What judges the schedules of a coarse graph."""
        name = f"closure/{solver_name()}"
        return lambda schedule: self.offer(expand(schedule, coarse.groups), name)

    def offer_baselines(self) -> None:
        """Judge what people do today."""
        for name, schedule in all_baselines(self.graph, self.budget_bytes):
            self.offer(schedule, name)


def _search(best: _Best, coarse: Coarse, deadline: float, gap: float) -> bool:
    """Offer `best` the program's schedules; True where its optimum was among them."""
    program = Closure(coarse.graph, coarse.tiny)
    found = program.solve(best.budget_bytes, deadline=deadline, gap=gap, judge=best.judge(coarse))
    return found.schedule is not None and found.status == "optimal"


def _certify(best: _Best, deadline: float, gap: float) -> int:
    plain_ns = sum(op.cost_ns for op in best.graph.ops)
    if best.timeline is None:
        return plain_ns
    return lower_bound(
        best.graph,
        best.budget_bytes,
        time_limit_s=min(_CERTIFICATE_S, deadline - time.monotonic()),
        tight=_tightest(best.schedule, best.timeline),
        enough_ns=best.timeline.time_ns - int(gap * plain_ns),
    )


def _lower_peak(best: _Best, deadline: float) -> None:
    """Offer `best` the schedules with the lowest peaks that can be found."""
    for graph in (coarsen(best.graph), uncoarsened(best.graph)):
        program = Closure(graph.graph, graph.tiny)
        program.solve(None, deadline=deadline, gap=0.001, judge=best.judge(graph))
    best.offer_baselines()


def _tightest(schedule: Schedule, timeline: Timeline) -> int | None:
    """The first run of a backward op during which a schedule holds most, in the later half of the backward's steps."""
    firsts = {i: t for t, i in reversed(list(enumerate(schedule.steps))) if t >= timeline.boundary and i >= 0}
    late = [t for t in firsts.values() if t >= (timeline.boundary + len(schedule.steps)) // 2]
    return schedule.steps[max(late, key=lambda t: timeline.live_bytes[t])] if late else None


def _failure(best: _Best, seconds: float) -> str:
    least, _ = floor(best.graph)
    return (
        f"no schedule within {format_bytes(best.budget_bytes)} was found in {seconds:.1f} s; that none exists was not proven "
        f"(the proven floor is {format_bytes(least)}). The lowest peak found is {format_bytes(best.lowest_bytes)} "
        f"({best.lowest_bytes} bytes). Raise the budget to that, give a longer time limit, or reduce the batch."
    )
