"""The stages of the search for one budget, quick ones first, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from planner.graph.schedule import Schedule
from planner.graph.simulate import Timeline
from planner.solver.backend import solver_name
from planner.solver.blocks import FINE, ROOMS, Blocks
from planner.solver.bound import Effort
from planner.solver.chain import Chain
from planner.solver.closure import Closure
from planner.solver.coarsen import Coarse, expand, uncoarsened
from planner.solver.exhaustive import Rules, exhaustive
from planner.solver.floor import floor
from planner.solver.local_search import LocalSearch
from planner.solver.pool import Entry
from planner.solver.window import Windows

if TYPE_CHECKING:
    from planner.solver.solve import Solver

TINY_OPS = 10
"""Up to so many ops, every schedule is looked at."""
_LATE = 0.04
"""Share of the time by which long programs end later than they are told."""
_QUICK_S = 0.8
_QUICK_GAP = 0.0025
"""After this many seconds, a plan this close to the bound is not worth more of them."""
_SOON_S, _SOON_GAP = 3.0, 0.005
"""And after these, one that is not much farther."""
_LEAST_S = 0.1
"""A stage for less than this is not begun."""
_CERTIFICATE_S = 0.5
"""A good bound comes soon or late: equal blocks make the last tenth of a percent slow to prove."""
_CERTIFICATE_SHARE = 0.25
"""Of the time, for rounds of the certificate after everything else."""
_EARLY_SHARE, _PROGRAM_SHARE, _REFINE_SHARE, _LOCAL_SHARE = 0.1, 0.4, 0.6, 0.4
"""Of what is left before that: first rounds of the certificate, the program with copies, more rounds, plain local search."""
_ROUGH_GAP = 0.002
"""Copies make the program slow: the moments that matter are found with a wide gap, which is closed at the end."""
_FAR = 0.02
"""A gap this wide asks for more than one recompute of a value: chains are tried."""
_BLOCKS_SHARE = 0.6
_WORSE = 3
"""So many schedules of blocks in a row that bring nothing end the search by larger steps."""
_CHAIN_SHARE = 0.3
_CHAINS = 12
_NEAR = 1.1
"""Peak over budget up to which local search is asked to make a schedule of blocks or of a chain fit."""


class Hunt:
    """The search for one budget in a solver's pool."""

    def __init__(self, solver: Solver, budget_bytes: int, start: float, end: float, gap: float) -> None:
        self.budget_bytes, self.gap = budget_bytes, gap
        self._solver, self._pool, self.plain_ns = solver, solver.pool, solver.plain_ns
        self._over = False  # everything was tried
        self._exact = False  # the program's optimum was offered
        self._near: list[int] = []  # the program's last schedule of the coarse graph
        self._fitted: list[int] = []  # the last that local search made fit
        self._bound_ns = solver.plain_ns
        self._efforts: set[Effort] = set()
        self._hint: Schedule | None = None
        self._blocks_tried = False
        self._settled = False  # the certificate has nothing more to say
        self.extend(start, end)

    @property
    def best(self) -> Entry | None:
        """The cheapest schedule known that fits."""
        return self._pool.cheapest(self.budget_bytes)

    def extend(self, start: float, end: float) -> None:
        """Give the next stages this time."""
        self.start, self.end = start, end
        self.search_end = end - _CERTIFICATE_SHARE * (end - start)

    def quickly(self) -> None:
        """Linear programs, then the program without copies in integers, each with local search from its answer."""
        if self.left() <= self.gap:
            return
        if len(self._pool.graph.ops) <= TINY_OPS:
            best = exhaustive(self._pool.graph, self.budget_bytes, Rules(backward_ops=False))
            if best is not None:
                self._pool.offer(best, "exhaustive search")
            self.certify("thorough")
            self._over = True
            return
        for effort in ("first", "linear"):
            self.certify(effort)
            self._fit_hint()
            if self.left() <= self.gap:
                return
        if _SOON_GAP < self.left() <= _FAR:  # the bound may be what is off
            self._for_a_share(_EARLY_SHARE, self._refine)
        program, coarse = self._solver.program, self._solver.coarse
        for relax in (True, False):
            if self.good_enough():
                return
            self._exact = self._program(program, coarse, self.deadline(), self.gap, relax=relax)
            if not self._exact:
                self._fit(self._near)
            if relax and self.left() <= _SOON_GAP:
                self._for_a_share(1.0, self._refine)
            if relax and self.left() > _FAR:
                self.fit_blocks()
                if self._bound_is_off():
                    return
        if self.best is None:
            self._fit(list(range(len(coarse.graph.ops))))
        if self.left() > _SOON_GAP:
            self._improve(coarse, self._fitted, min(self.search_end, time.monotonic() + _QUICK_S / 2))

    def left(self) -> float:
        """How far from the optimum the best plan can be at most, as a fraction of the plain step's time."""
        best = self.best
        if best is None:
            return 1.0
        gap = (best.timeline.time_ns - self.certify()) / max(1, self.plain_ns)
        if self.gap < gap <= 10 * self.gap:  # so near, integers in the certificate may settle it
            gap = (best.timeline.time_ns - self.certify("exact")) / max(1, self.plain_ns)
        return gap

    def _bound_is_off(self) -> bool:
        """Rounds of the certificate are slow here, and worth their time."""
        return self._solver.bounds.slow and self.left() <= _FAR

    def good_enough(self) -> bool:
        """More search cannot gain much in proportion to its time."""
        return self._over or time.monotonic() >= self.deadline()

    def deadline(self) -> float:
        """When to stop, by how much can still be gained."""
        left = self.left()
        if left <= self.gap:
            return self.start
        seconds = _QUICK_S if left <= _QUICK_GAP else _SOON_S if left <= _SOON_GAP else math.inf
        return min(self.search_end, self.start + seconds)

    def thoroughly(self) -> None:
        """All that the quick stages left out, until the plan is good enough."""
        if self.left() > _SOON_GAP:
            self.fit_blocks()
        if self._bound_is_off() and not self.good_enough():
            self._refine(self.end - _LATE * (self.end - self.start))
        if self.best is None or (self.left() > _SOON_GAP and not self.good_enough()):
            self._solver.offer_baselines(self.budget_bytes)
        self._for_a_share(_EARLY_SHARE, self._refine)
        self._for_a_share(_PROGRAM_SHARE, self._with_copies)
        self._for_a_share(_REFINE_SHARE, self._refine)
        if not self.good_enough():
            self._search_on()
        if self.left() > _SOON_GAP:
            self._refine(self.end)

    def _for_a_share(self, share: float, stage: Callable[[float], None]) -> None:
        """A stage for a part of the time that is left; rounds of the certificate take too long for the last second."""
        now = time.monotonic()
        hurried = stage == self._refine and self.search_end - now < _QUICK_S
        until = min(now + share * (self.search_end - now), self.deadline())
        if until - now > _LEAST_S and not hurried:
            stage(until)

    def _with_copies(self, deadline: float) -> None:
        """The program with copies, coarse and as it is: merged ops hold their inputs a little longer than they must."""
        fine = self._solver.fine
        for program, coarse in [(self._solver.program, self._solver.coarse), *([fine] if fine else [])]:
            gap = max(self.gap, _ROUGH_GAP)
            while not self._exact and time.monotonic() < min(deadline, self.deadline()):
                known = program.knows()
                if self._program(program, coarse, deadline, gap):
                    self._exact, gap = gap == self.gap, self.gap
                elif program.knows() == known:
                    break
                elif coarse is self._solver.coarse:
                    self._fit(self._near)

    def _search_on(self) -> None:
        """Chains where a value may have to be recomputed more than once, then search around the best schedule."""
        if self.left() > _FAR:
            self.fit_chain()
        if self.best is None:
            self._fit_any(self.search_end)
        if self.best is not None and not self.good_enough():
            until, enough_ns = self.deadline(), self.certify() + self.gap * self.plain_ns
            until = time.monotonic() + _LOCAL_SHARE * (until - time.monotonic())
            search, steps = self._search(), list(self.best.schedule.steps)
            better = search.squeeze(search.improve(steps, (time.monotonic() + until) / 2, enough_ns), until)
            better = search.improve(better, until, enough_ns)
            self._pool.offer(Schedule(tuple(better)), "local search")
            windows = Windows(self._pool.graph, self.budget_bytes)
            better = windows.improve(list(self.best.schedule.steps), self.deadline(), enough_ns)
            self._pool.offer(Schedule(tuple(better)), "windows")

    def _search(self) -> LocalSearch:
        return LocalSearch(self._pool.graph, self.budget_bytes)

    def fit_blocks(self) -> None:
        """Schedules of the forward as a chain of unequal blocks, made to fit: where very many moments are tight at once."""
        now = time.monotonic()
        if self._blocks_tried or self.search_end - now < _QUICK_S:  # menus take their time
            return
        until = now + _BLOCKS_SHARE * (self.search_end - now)
        blocks = Blocks(self._solver.pieces, self.budget_bytes, until)
        self._blocks_tried = blocks.complete
        if blocks.complete:
            best = self._least_room(blocks, ROOMS, _WORSE, until)
            finer = sorted((best + n * FINE for n in range(-9, 10)), key=lambda room: abs(room - best))
            if self.left() > _SOON_GAP:
                self._least_room(blocks, finer, len(finer), until)

    def _least_room(self, blocks: Blocks, rooms: Sequence[float], patience: int, deadline: float) -> float:
        """Offer schedules of blocks with these shares of the budget, made to fit; the share that gave the cheapest.

        `patience`: so many in a row that bring nothing, and the rest will not either.
        """
        coarse, tried = self._solver.coarse, set[Schedule]()
        worse, best, least_ns = 0, rooms[0], math.inf
        for room in rooms:
            schedule = blocks.schedule(room)
            if schedule is None or schedule in tried:
                continue
            if time.monotonic() >= deadline or worse == patience:
                break
            tried.add(schedule)
            steps = self._made_to_fit(list(schedule.steps), "blocks, local search", deadline)
            time_ns = math.inf if steps is None else sum(coarse.graph.ops[i].cost_ns for i in steps)
            worse, best, least_ns = (0, room, time_ns) if time_ns < least_ns else (worse + 1, best, least_ns)
        return best

    def _made_to_fit(self, steps: list[int], name: str, deadline: float) -> list[int] | None:
        """A schedule of the coarse graph that local search makes fit, if it is near, and offers."""
        coarse = self._solver.coarse
        search = LocalSearch(coarse.graph, self.budget_bytes)
        useful, run = search.useful(steps)
        near = int(run.live_bytes.max()) <= _NEAR * self.budget_bytes
        repaired = search.repair(useful, deadline) if near else None
        if repaired is None:
            return None
        made = search.shrink(repaired, deadline)
        self._pool.offer(expand(Schedule(tuple(made)), coarse.groups), name)
        return made

    def fit_chain(self) -> None:
        """Schedules of the forward as a chain of segments, made to fit: for budgets that take more than one recompute."""
        coarse = self._solver.coarse
        now = time.monotonic()
        until = now + _CHAIN_SHARE * (self.search_end - now)
        chain = Chain(coarse.graph, self.budget_bytes, until)
        tried = 0
        for steps in chain.schedules() if chain.complete else ():
            if time.monotonic() >= until or tried == _CHAINS:
                return
            tried += self._made_to_fit(steps, "chain, local search", until) is not None

    def certify(self, effort: Effort = "linear") -> int:
        """A lower bound on the time of every schedule that fits, with at least this effort."""
        late = bool(self._efforts) and time.monotonic() >= self.end
        if effort not in self._efforts and not late:
            self._efforts.add(effort)
            self._certify(effort, min(self.end - time.monotonic(), _CERTIFICATE_S))
        return self._bound_ns

    def _certify(self, effort: Effort, seconds: float) -> None:
        best, plain_ns = self.best, self.plain_ns
        if best is not None and best.timeline.time_ns <= plain_ns:
            return
        bound_ns = self._solver.bounds.lower_bound(
            self.budget_bytes,
            effort=effort,
            time_limit_s=max(0.1, seconds),
            enough_ns=None if best is None else best.timeline.time_ns - int(self.gap * plain_ns),
        )
        self._bound_ns = max(self._bound_ns, bound_ns)

    def _refine(self, deadline: float) -> None:
        """Rounds of the certificate, each with the schedule it hints at, while they bring something."""
        bounds = self._solver.bounds
        while not self._settled and self.left() > self.gap and time.monotonic() < deadline:
            self._settled = not bounds.refine(self.budget_bytes, time_limit_s=deadline - time.monotonic())
            self._bound_ns = max(self._bound_ns, bounds.known_ns(self.budget_bytes))
            self._fit_hint()

    def _fit_hint(self) -> None:
        """What is alive at the certificate's cuts makes a schedule that takes hardly more than the bound, if it fits."""
        schedule = self._solver.bounds.hinted
        if schedule is None or schedule == self._hint:
            return
        self._hint = schedule
        self._pool.offer(schedule, f"certificate/{solver_name()}")
        search = self._search()
        repaired = search.repair(list(schedule.steps), min(self.search_end, time.monotonic() + _QUICK_S / 2))
        if repaired is not None:
            steps = search.shrink(repaired, self.search_end)
            self._pool.offer(Schedule(tuple(steps)), f"certificate/{solver_name()}, local search")

    def _program(self, program: Closure, coarse: Coarse, deadline: float, gap: float, *, relax: bool = False) -> bool:
        """Offer the program's schedules; True where its optimum was among them."""
        judge = self._judge(coarse)
        found = program.solve(self.budget_bytes, deadline=deadline, gap=gap, judge=judge, hurried=True, relax=relax)
        return found.schedule is not None and found.status == "optimal" and not relax

    def _judge(self, coarse: Coarse) -> Callable[[Schedule], Timeline]:
        """What judges the schedules of a coarse graph."""
        name = f"closure/{solver_name()}"

        def judge(schedule: Schedule) -> Timeline:
            if coarse is self._solver.coarse:
                self._near = list(schedule.steps)
            return self._pool.offer(expand(schedule, coarse.groups), name)

        return judge

    def _fit(self, steps: list[int]) -> None:
        """Make a schedule of the coarse graph fit, and offer it."""
        coarse = self._solver.coarse
        search = LocalSearch(coarse.graph, self.budget_bytes)
        until = min(self.deadline(), time.monotonic() + 2 * _QUICK_S)  # what takes longer is far from a good schedule
        repaired = search.repair(steps, until) if steps else None
        if repaired is not None:
            self._fitted = search.shrink(repaired, until)
            self._pool.offer(expand(Schedule(tuple(self._fitted)), coarse.groups), f"closure/{solver_name()}, local search")

    def _improve(self, coarse: Coarse, steps: list[int], deadline: float) -> None:
        """Search around a schedule of a coarse graph that fits, and offer what was found."""
        if steps:
            enough_ns = self.certify() + self.gap * self.plain_ns
            better = LocalSearch(coarse.graph, self.budget_bytes).improve(steps, deadline, enough_ns)
            self._pool.offer(expand(Schedule(tuple(better)), coarse.groups), "local search")

    def _fit_any(self, deadline: float) -> None:
        """Make one of the baselines fit."""
        search = LocalSearch(self._pool.graph, self.budget_bytes)
        for name, schedule in self._solver.baselines(self.budget_bytes):
            repaired = search.repair(list(schedule.steps), deadline)
            if repaired is not None:
                self._pool.offer(Schedule(tuple(search.shrink(repaired, deadline))), f"{name}, local search")


def lower_peak(solver: Solver, budget_bytes: int, deadline: float) -> None:
    """Offer the schedules with the lowest peaks that can be found; one within the budget is enough."""
    pool = solver.pool
    start = time.monotonic()
    for coarse in (solver.coarse, uncoarsened(pool.graph)):

        def judge(schedule: Schedule, coarse: Coarse = coarse) -> Timeline:
            return pool.offer(expand(schedule, coarse.groups), f"closure/{solver_name()}")

        program = Closure(coarse.graph, coarse.tiny)
        program.solve(None, deadline=start + (deadline - start) / 4, gap=0.001, judge=judge)
    solver.offer_baselines(budget_bytes)
    least = low = target = max(budget_bytes, floor(pool.graph)[0])
    while pool.lowest.timeline.peak_bytes > least and time.monotonic() < deadline:
        now = time.monotonic()
        # From a lower start, what failed before may succeed.
        low = least if _reached(solver, target, now + (deadline - now) / 3) else target + 1
        high = pool.lowest.timeline.peak_bytes
        target = (low + high) // 2 if high - least > high // 1000 else least
        if low > least and high - low <= high // 1000:
            break


def _reached(solver: Solver, budget_bytes: int, deadline: float) -> bool:
    """Some schedule fits: from the lowest known, by the quick stages, in blocks, or as a chain."""
    pool = solver.pool
    steps = LocalSearch(pool.graph, budget_bytes).repair(list(pool.lowest.schedule.steps), deadline)
    if steps is not None:
        pool.offer(Schedule(tuple(steps)), "local search")
    hunt = Hunt(solver, budget_bytes, time.monotonic(), deadline, 1.0)
    if hunt.best is None:
        hunt.quickly()
    for fit in (hunt.fit_blocks, hunt.fit_chain):
        if hunt.best is None and time.monotonic() < deadline:
            fit()
    return hunt.best is not None
