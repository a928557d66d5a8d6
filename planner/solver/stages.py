"""The strategies of the stages: ways to find schedules and bounds, all with one signature.

A strategy is a generator that is given a problem, the search to report to, and what it may spend. It yields whenever it may be
interrupted, and yields its progress; it ends when it can do nothing more. What it may spend grows between two yields.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain, combinations

from planner.graph.floor import floor
from planner.graph.schedule import Schedule
from planner.solver.baselines import greedy
from planner.solver.lazy import lazy_schedule
from planner.solver.local_search import LocalSearch
from planner.solver.problem import Problem
from planner.solver.search import Archive, Search
from planner.solver.segments import Segments
from planner.solver.tuning import FEW, GAP, SLACK
from planner.solver.work import Work


class Progress(enum.Enum):
    """What a strategy has reached since it last yielded. That the best schedule or the bound changed, `Search.state` says."""

    OUT_OF_WORK = "in the middle of something, which it goes on with next time"
    ADVANCED = "it is a step further: another program, another schedule to start from"
    TRIED = "it tried one of several starts"


Strategy = Callable[[Problem, Search, Work], Iterator[Progress]]


def certificate(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """Linear programs of the best single cuts; then integer programs with more and more cuts. Each gives a candidate."""
    bounds, budget = problem.models.certificate, problem.budget_bytes
    best, best_ns = -1, -1
    for cut in bounds.cuts.ranked(budget)[:FEW]:
        found = bounds.bound(budget, (cut,), work, relax=True)
        while not found.is_final:
            yield Progress.OUT_OF_WORK
            found = bounds.bound(budget, (cut,), work, relax=True)
        if found.time_ns > best_ns:
            best, best_ns = cut, found.time_ns
        if search.raise_bound(found.time_ns) and found.candidate is not None:
            yield from _fit(search, found.candidate.steps, "certificate", work)
        yield Progress.ADVANCED
    cuts, candidate_before = bounds.first_cuts(budget, best) if best >= 0 else (), None
    known_ns = search.bound_ns  # by fewer cuts
    while cuts:
        found = bounds.bound(budget, cuts, work, gap=problem.precision / 2, relax=False, known_ns=known_ns)
        search.raise_bound(found.time_ns)
        if found.candidate is not None and found.candidate != candidate_before:
            candidate_before = found.candidate
            yield from _fit(search, found.candidate.steps, "certificate", work)
        yield Progress.ADVANCED if found.is_final else Progress.OUT_OF_WORK
        if found.is_final:
            more = bounds.next_cuts(budget, cuts, found.candidate)
            cuts, known_ns = more if more != cuts else (), search.bound_ns


def smaller_budgets(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """The certificate, and exchanges from what it gives, for smaller budgets: what exceeds one of these may fit this one.

    The programs count less than a step holds, so that their candidates for this budget may all exceed it. Each smaller budget
    has an archive of its own: the shared one drops a schedule that a cheaper one of no higher peak beats, and exchanges start
    only from what is kept.
    """
    least, most = floor(problem.graph)[0], problem.budget_bytes
    for smaller in sorted({most - ((most - least) >> part) for part in range(FEW)} - {most}):  # the floor, 1/2, 3/4 of the way
        apart = Search(Archive(problem.graph), smaller)
        for strategy in (certificate, exchange):
            for progress in strategy(Problem(problem.models, smaller, problem.gap), apart, work):
                found = apart.archive.lowest
                if found.timeline.peak_bytes < search.archive.lowest.timeline.peak_bytes:
                    search.offer(found.schedule.steps, found.source, work)
                yield progress


def segments(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """Dynamic programming over the forward in pieces, for many shares of the budget, in coarse steps first."""
    pieces, fewer = problem.models.pieces
    for again in (False, True):
        table = Segments(fewer if again else pieces, problem.budget_bytes, again=again)
        while not table.fill(work):
            yield Progress.OUT_OF_WORK
        best = yield from _best_factor(table, [n / 100 for n in range(97, 200)], problem, search, work)
        finer = sorted((best + n / 1000 for n in range(-9, 10)), key=lambda factor: (abs(factor - best), factor))
        yield from _best_factor(table, finer, problem, search, work)


def _best_factor(
    table: Segments, factors: Sequence[float], problem: Problem, search: Search, work: Work
) -> Generator[Progress, None, float]:
    """Offer the table's schedules for these shares of the budget, made to fit; returns the share that gave the cheapest.

    The largest shares come last: `FEW` in a row that are no better than what fitted, and the rest will not be either.
    """
    tried, worse, least_ns = set[Schedule](), 0, math.inf
    best = next((factor for factor in factors if table.schedule(factor) is not None), factors[0])
    for factor in factors:
        schedule = table.schedule(factor)
        if schedule is None or schedule in tried:
            continue
        tried.add(schedule)
        steps = yield from _fit(search, schedule.steps, "segments", work, near=1 + SLACK)
        time_ns = math.inf if steps is None else search.local.time_ns(steps)
        found_before = least_ns < math.inf
        worse, best, least_ns = (0, factor, time_ns) if time_ns < least_ns else (worse + found_before, best, least_ns)
        if worse == FEW:
            break
        yield Progress.TRIED
    return best


def _fit(
    search: Search, steps: Sequence[int], source: str, work: Work, *, near: float = math.inf
) -> Generator[Progress, None, list[int] | None]:
    """`Search.fit`; what was cut short is tried again with more work, a few times: some schedules are beyond repair."""
    for _ in range(FEW):
        made = search.fit(steps, source, work, near=near)
        if made is not None or not work.is_over:
            return made
        yield Progress.OUT_OF_WORK
    return None


def baselines(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """Reference schedules, made to fit where nothing else does."""
    found = [("greedy", greedy(problem.graph, problem.budget_bytes)), *problem.models.baselines]
    for name, schedule in found:
        search.offer(schedule.steps, name, work)
        yield Progress.TRIED
    for name, schedule in found:
        if search.best is not None:
            return
        yield from _fit(search, schedule.steps, name, work)
        yield Progress.TRIED


def descent(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """Make the lowest schedule lower, step by step: what local search cannot do at once it may do in two steps."""
    archive, asked = search.archive, problem.budget_bytes
    for _ in range(FEW):  # times that it may be cut short in all; a thousandth above is left to others
        while archive.lowest.timeline.peak_bytes - asked > GAP * archive.lowest.timeline.peak_bytes:
            local = LocalSearch(archive.graph, asked, archive.simulator)
            steps = local.repair(list(archive.lowest.schedule.steps), work)
            if steps is None and work.is_over:
                break
            if steps is not None:
                search.offer(steps, "lowest peak, local search", work)
            asked = problem.budget_bytes if steps is not None else (asked + archive.lowest.timeline.peak_bytes) // 2
            yield Progress.ADVANCED
        else:
            return
        yield Progress.OUT_OF_WORK


def exchange(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """From each schedule on, keep up to `FEW` more values or fewer: all that lies between two schedules may be higher."""
    graph, tried = problem.graph, set[Schedule]()
    written = [name for op in graph.ops[: graph.num_forward_ops] if op.recomputable for name in op.writes]
    heavy = sorted(written, key=lambda name: -graph.value[name].nbytes)[: 4 * FEW]
    while (start := search.archive.lowest_except(tried)) is not None:
        tried.add(start.schedule)
        for names in chain.from_iterable(combinations(heavy, count) for count in range(1, FEW + 1)):
            kept = set(start.timeline.saved).symmetric_difference(names)
            search.offer(lazy_schedule(graph, kept).steps, "exchange", work)
            yield Progress.OUT_OF_WORK if work.is_over else Progress.TRIED


def local_search(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
    """From the best schedule, delete one recompute after the other, and evict something else."""
    local = search.local
    for squeezed in (False, True):
        assert search.best is not None
        steps = list(search.best.schedule.steps)
        if squeezed:
            steps = local.squeeze(steps, work)
            yield Progress.TRIED
        for better in local.improve(steps, work):
            if better != steps:
                steps = better
                search.offer(steps, "local search", work)
            yield Progress.OUT_OF_WORK if work.is_over else Progress.TRIED
