"""The cheapest schedule within a budget: coarsen, solve the program, search around its answer, expand, simulate, certify."""

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
from planner.solver.local_search import LocalSearch
from planner.units import format_bytes

__all__ = ["floor", "lowest_peak", "solve"]

_QUICK_S = 1.0
_QUICK_GAP = 0.005
"""After this many seconds, a plan this close to the bound is not worth more of them."""
_CERTIFICATE_S = 0.5
"""A good bound comes soon or late: equal blocks make the last tenth of a percent slow to prove."""
_CERTIFICATE_SHARE = 0.3
"""Of the time, for a thorough certificate where the quick one leaves a gap."""
_ROUGH_GAP = 0.002
"""Copies make the program slow: the moments that matter are found with a wide gap, which is closed at the end."""
_PROGRAM_SHARE = 0.6
"""Of the time, for the program; the rest is for local search."""


def solve(graph: Graph, budget_bytes: int, *, time_limit_s: float = 10.0, gap: float = 0.0005) -> Solution:
    """The cheapest schedule found whose simulated peak on `graph` is within the budget.

    The program's answer without exact copies is near and quick; local search makes it fit. Where the certificate then
    leaves a gap, the program with copies and further search take turns until the time is up.

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
    hunt = _Hunt(best, start, start + time_limit_s, gap)
    hunt.quickly()
    hunt.thoroughly()
    if best.timeline is None:
        _lower_peak(best, start + time_limit_s)
    if best.timeline is None:
        raise NoScheduleFoundError(_failure(best, time.monotonic() - start))
    bound_ns, time_ns = hunt.certify(), best.timeline.time_ns
    if bound_ns > time_ns:  # contradicted by the schedule at hand: numerical trouble, so claim nothing
        bound_ns = plain.time_ns
    status = "optimal" if time_ns - bound_ns <= gap * plain.time_ns else "feasible"
    return Solution(status, best.schedule, bound_ns, time.monotonic() - start, best.solver)


def lowest_peak(graph: Graph, *, time_limit_s: float = 10.0) -> int:
    """The lowest peak, in bytes, of any schedule this solver finds: a budget that `solve` can meet."""
    best = _Best(graph, 0)
    best.offer(keep_all(graph), "keep all")
    _lower_peak(best, time.monotonic() + time_limit_s)
    return best.lowest_bytes


class _Best:
    """The cheapest schedule that fits, and the one with the lowest peak among all that were offered."""

    schedule: Schedule = Schedule(())
    timeline: Timeline | None = None
    solver: str = ""
    lowest_bytes: int = 2**63 - 1
    lowest: Schedule = Schedule(())

    def __init__(self, graph: Graph, budget_bytes: int) -> None:
        self.graph, self.budget_bytes = graph, budget_bytes

    def offer(self, schedule: Schedule, solver: str) -> Timeline:
        """Simulate a schedule of the original graph, the only judgement that counts."""
        timeline = simulate(self.graph, schedule)
        if timeline.peak_bytes < self.lowest_bytes:
            self.lowest_bytes, self.lowest = timeline.peak_bytes, schedule
        if timeline.peak_bytes <= self.budget_bytes and (self.timeline is None or timeline.time_ns < self.timeline.time_ns):
            self.schedule, self.timeline, self.solver = schedule, timeline, solver
        return timeline

    def offer_baselines(self) -> None:
        """Judge what people do today."""
        for name, schedule in all_baselines(self.graph, self.budget_bytes):
            self.offer(schedule, name)


class _Hunt:
    """The stages of one `solve`, and what they share."""

    def __init__(self, best: _Best, start: float, end: float, gap: float) -> None:
        self.best, self.start, self.end, self.gap = best, start, end, gap
        self.search_end = end - _CERTIFICATE_SHARE * (end - start)
        self.coarse = coarsen(best.graph)
        self.program = Closure(self.coarse.graph, self.coarse.tiny)
        self.plain_ns = sum(op.cost_ns for op in best.graph.ops)
        self._exact = False  # the program's optimum was offered
        self._near: list[int] = []  # the program's last schedule of the coarse graph
        self._fitted: list[int] = []  # the last that local search made fit
        self._bound_ns = 0

    def quickly(self) -> None:
        """The program without copies, then local search from its last answer."""
        self._exact = self._solve(self.program, self.coarse, self.search_end, self.gap)
        if not self._exact and self._near:
            self._fit(self._near)
        if self.best.timeline is None:
            self._fit(list(range(len(self.coarse.graph.ops))))
        if self.left() > _QUICK_GAP:
            self._improve(self.coarse, self._fitted, min(self.search_end, time.monotonic() + _QUICK_S / 2))

    def left(self) -> float:
        """How far from the optimum the best plan can be at most, as a fraction of the plain step's time."""
        timeline = self.best.timeline
        return 1.0 if timeline is None else (timeline.time_ns - self.certify()) / max(1, self.plain_ns)

    def deadline(self) -> float:
        """When to stop: near the optimum, more search cannot gain much in proportion to its time."""
        left = self.left()
        if left <= self.gap:
            return self.start
        return min(self.search_end, self.start + _QUICK_S) if left <= _QUICK_GAP else self.search_end

    def thoroughly(self) -> None:
        """The program with copies, coarse and as it is, and search around what it finds, until it is good enough."""
        until = time.monotonic() + _PROGRAM_SHARE * (self.search_end - time.monotonic())
        coarses = [(self.program, self.coarse)]
        if len(self.coarse.groups) < len(self.best.graph.ops):
            # Merged ops hold their inputs a little longer than they must: look again without merging.
            fine = uncoarsened(self.best.graph)
            coarses.append((Closure(fine.graph, fine.tiny), fine))
        for program, coarse in coarses:
            gap = max(self.gap, _ROUGH_GAP)
            while not self._exact and time.monotonic() < min(until, self.deadline()):
                copies = len(program.copies)
                if self._solve(program, coarse, until, gap):
                    self._exact, gap = gap == self.gap, self.gap
                elif len(program.copies) == copies:
                    break
                elif coarse is self.coarse and self._near:
                    self._fit(self._near)
        if self.best.timeline is None:
            self._fit_any(self.search_end)
        if self.best.timeline is not None and time.monotonic() < self.deadline():
            self.best.offer_baselines()
            self._improve(uncoarsened(self.best.graph), list(self.best.schedule.steps), self.deadline())
        if self.left() > _QUICK_GAP:
            self.certify(thorough=True)

    def certify(self, *, thorough: bool = False) -> int:
        """A lower bound on the time of every schedule that fits."""
        timeline, plain_ns = self.best.timeline, self.plain_ns
        if timeline is None:
            return plain_ns
        if thorough or not self._bound_ns:
            seconds = self.end - time.monotonic() if thorough else _CERTIFICATE_S
            bound_ns = lower_bound(
                self.best.graph,
                self.best.budget_bytes,
                time_limit_s=max(0.1, min(seconds, self.end - time.monotonic())),
                tight=_tightest(self.best.schedule, timeline),
                enough_ns=timeline.time_ns - int(self.gap * plain_ns),
                thorough=thorough,
            )
            self._bound_ns = max(self._bound_ns, bound_ns)
        return self._bound_ns

    def _solve(self, program: Closure, coarse: Coarse, deadline: float, gap: float) -> bool:
        """Offer the program's schedules; True where its optimum was among them."""
        judge = self._judge(coarse)
        found = program.solve(self.best.budget_bytes, deadline=deadline, gap=gap, judge=judge, hurried=True)
        return found.schedule is not None and found.status == "optimal"

    def _judge(self, coarse: Coarse) -> Callable[[Schedule], Timeline]:
        """What judges the schedules of a coarse graph."""
        name = f"closure/{solver_name()}"

        def judge(schedule: Schedule) -> Timeline:
            if coarse is self.coarse:
                self._near = list(schedule.steps)
            return self.best.offer(expand(schedule, coarse.groups), name)

        return judge

    def _fit(self, steps: list[int]) -> None:
        """Make a schedule of the coarse graph fit, and offer it."""
        search = LocalSearch(self.coarse.graph, self.best.budget_bytes)
        repaired = search.repair(steps, self.search_end)
        if repaired is not None:
            self._fitted = search.shrink(repaired, self.search_end)
            self.best.offer(expand(Schedule(tuple(self._fitted)), self.coarse.groups), f"closure/{solver_name()}, local search")

    def _improve(self, coarse: Coarse, steps: list[int], deadline: float) -> None:
        """Search around a schedule of a coarse graph that fits, and offer what was found."""
        if steps:
            enough_ns = self.certify() + self.gap * self.plain_ns
            better = LocalSearch(coarse.graph, self.best.budget_bytes).improve(steps, deadline, enough_ns)
            self.best.offer(expand(Schedule(tuple(better)), coarse.groups), "local search")

    def _fit_any(self, deadline: float) -> None:
        """Make one of the baselines fit."""
        search = LocalSearch(self.best.graph, self.best.budget_bytes)
        for name, schedule in all_baselines(self.best.graph, self.best.budget_bytes):
            repaired = search.repair(list(schedule.steps), deadline)
            if repaired is not None:
                self.best.offer(Schedule(tuple(search.shrink(repaired, deadline))), f"{name}, local search")


def _lower_peak(best: _Best, deadline: float) -> None:
    """Offer `best` the schedules with the lowest peaks that can be found."""
    for coarse in (coarsen(best.graph), uncoarsened(best.graph)):

        def judge(schedule: Schedule, coarse: Coarse = coarse) -> Timeline:
            return best.offer(expand(schedule, coarse.groups), f"closure/{solver_name()}")

        Closure(coarse.graph, coarse.tiny).solve(None, deadline=deadline, gap=0.001, judge=judge)
    best.offer_baselines()
    low, high = max(best.budget_bytes, floor(best.graph)[0]), best.lowest_bytes
    target = low  # the budget itself first, then by bisection to a thousandth
    while low < high and time.monotonic() < deadline:
        steps = LocalSearch(best.graph, target).repair(list(best.lowest.steps), deadline)
        if steps is None:
            low = target + 1
        else:
            high = best.offer(Schedule(tuple(steps)), "local search").peak_bytes
        target = (low + high) // 2
        if high - low <= best.lowest_bytes // 1000:
            break


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
