"""The stages: ways to find schedules and bounds, all with one signature.

A stage is a generator that is given a problem, the search to report to, and what it may spend. It yields whenever it may be
interrupted: True where it learnt something or was cut short, so that it may get on with more; it ends when it has nothing more
to say. What it may spend grows between two yields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from planner.graph.schedule import Schedule
from planner.graph.simulate import Timeline
from planner.solver.baselines import all_baselines
from planner.solver.coarsen import Coarse
from planner.solver.exhaustive import Rules
from planner.solver.exhaustive import exhaustive as exhaustive_search
from planner.solver.keepset import KeepSet
from planner.solver.problem import Problem
from planner.solver.search import Search
from planner.solver.segments import Segments
from planner.solver.tuning import FEW, GAP, SLACK
from planner.solver.work import Work

Strategy = Callable[[Problem, Search, Work], Iterator[bool]]


def exhaustive(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """Every schedule; only for graphs of a few ops."""
    best = exhaustive_search(problem.graph, problem.budget_bytes, Rules(backward_ops=False))
    if best is not None:
        search.archive.offer(best, "exhaustive search")
    yield False


def certificate(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """Linear programs of the best single cuts; then rounds in integers with more and more cuts. Each hints at a schedule."""
    bounds, budget, level = problem.models.certificate, problem.budget_bytes, problem.models.fine
    best, best_ns = -1, -1
    for cut in bounds.cuts.ranked(budget)[:FEW]:
        found = bounds.bound(budget, (cut,), work, relax=True)
        while not found.is_final:
            yield True
            found = bounds.bound(budget, (cut,), work, relax=True)
        if found.time_ns > best_ns:
            best, best_ns = cut, found.time_ns
        if search.raise_bound(found.time_ns) and found.hint is not None:
            search.fit(found.hint.steps, level, "certificate", work)
        yield True
    if best < 0:
        return
    cuts, hinted = bounds.first_cuts(budget, best), None
    while True:
        found = bounds.bound(budget, cuts, work, gap=GAP / 2, relax=False)
        search.raise_bound(found.time_ns)
        if found.hint is not None and found.hint != hinted:
            hinted = found.hint
            search.fit(found.hint.steps, level, "certificate", work)
        if found.is_final:
            more = bounds.next_cuts(budget, cuts, found.hint)
            if more == cuts:
                return
            cuts = more
        yield True


def keep_set(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """The program over kept sets: linear, then in integers, on the coarse graph and on the graph as it is."""
    for n, (program, level) in enumerate(problem.models.keep_sets):
        for relax in (True, False) if n == 0 else (False,):
            yield from _rounds(program, level, problem, search, work, relax=relax)


def _rounds(program: KeepSet, level: Coarse, problem: Problem, search: Search, work: Work, *, relax: bool) -> Iterator[bool]:
    """Offer what a program says; what only exact copies can mend, or rounding broke, is made to fit."""

    def judge(schedule: Schedule) -> Timeline:
        return search.offer(schedule.steps, level, "keep set", work)

    # Copies make the program slow: the moments that matter are found with a wider gap.
    gap = 2 * GAP if program.num_copies else GAP
    for found in program.rounds(problem.budget_bytes, work, gap=gap, judge=judge, relax=relax):
        if found.schedule is not None and (found.grew or found.is_last):
            search.fit(found.schedule.steps, level, "keep set", work)
        yield found.grew or found.schedule is None


def segments(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """Dynamic programming over the forward in pieces, for many shares of the budget; the coarse ones first."""
    pieces, fewer = problem.models.pieces
    for again in (False, True):
        table = Segments(fewer if again else pieces, problem.budget_bytes, again=again)
        while not table.fill(work):
            yield True
        rooms = [n / 100 for n in range(97, 200)]
        best = yield from _least_room(table, rooms, problem, search, work)
        finer = sorted((best + n / 1000 for n in range(-9, 10)), key=lambda room: (abs(room - best), room))
        yield from _least_room(table, finer, problem, search, work)


def _least_room(table: Segments, rooms: list[float], problem: Problem, search: Search, work: Work):  # type: ignore[no-untyped-def]
    """Offer the table's schedules for these shares of the budget, made to fit; returns the share that gave the cheapest.

    The largest shares come last: as many in a row as `FEW` that bring nothing, and the rest will not either.
    """
    level, tried = problem.models.coarse, set[Schedule]()
    worse, best, least_ns = 0, rooms[0], math.inf
    for room in rooms:
        schedule = table.schedule(room)
        if schedule is None or schedule in tried:
            continue
        tried.add(schedule)
        steps = search.fit(schedule.steps, level, "segments", work, near=1 + SLACK)
        time_ns = math.inf if steps is None else search.local(level).time_ns(steps)
        worse, best, least_ns = (0, room, time_ns) if time_ns < least_ns else (worse + 1, best, least_ns)
        if worse == FEW:
            break
        yield False
    return best


def baselines(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """What people do today, made to fit where nothing else does."""
    level = problem.models.fine
    for name, schedule in all_baselines(problem.graph, problem.budget_bytes):
        search.offer(schedule.steps, level, name, work)
        yield False
    for name, schedule in all_baselines(problem.graph, problem.budget_bytes):
        if search.best is not None:
            return
        search.fit(schedule.steps, level, name, work)
        yield False


def lowest_peak(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """Programs that minimise the peak, and the lowest schedule made lower, where nothing fits yet."""
    for level in (problem.models.coarse, problem.models.fine):
        program = KeepSet(level.graph, level.tiny, lowest=True, simulator=level.simulator)

        def judge(schedule: Schedule, level: Coarse = level) -> Timeline:
            return search.offer(schedule.steps, level, "lowest peak", work)

        for _ in program.rounds(None, work, gap=GAP, judge=judge):
            yield True
    search.fit(search.archive.lowest.schedule.steps, problem.models.fine, search.archive.lowest.source, work)
    yield False


def local_search(problem: Problem, search: Search, work: Work) -> Iterator[bool]:
    """From the best schedule, one recompute after the other is taken back, and something else recomputed."""
    level = problem.models.fine
    local = search.local(level)
    for change in (local.improve, local.squeeze, local.improve):
        assert search.best is not None
        search.offer(change(list(search.best.schedule.steps), work), level, "local search", work)
        yield False
