"""The certificate: a lower bound on the time of every schedule that fits, no matter what it recomputes.

`planner.solver.relaxation` has the program. Which cuts? The best single one, by an estimate; then what is alive at the cuts of
the program's answer makes a schedule, and the ops at which that is over the budget are the next cuts. Where the schedule fits
and takes no more than the bound, it is optimal; on its way there it is a good place for local search to start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from planner.graph.floor import least_bytes
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator
from planner.solver.backend import SCALE
from planner.solver.cuts import Cuts
from planner.solver.lazy import lazy_schedule
from planner.solver.relaxation import Relaxation
from planner.solver.tuning import FEW, SLACK
from planner.solver.watch_points import RelaxationWithWatchPoints, WatchPoints
from planner.solver.work import Work

_TOLERANCE = 1e-6
"""Relative slack given to the budget and taken from the bound, above HiGHS's tolerances."""
NEVER_NS = 2**62
"""Nanoseconds added where the relaxation has no solution at all: nothing fits."""

CutSet = tuple[int, ...]
"""Ops, in order, at whose first runs a program looks."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What one program said.

    Attributes:
        time_ns: no schedule that fits takes less.
        candidate: a schedule that keeps what the program's answer keeps; hardly dearer than the bound. It may not fit.
        is_final: more work would not raise it.
    """

    time_ns: int
    candidate: Schedule | None
    is_final: bool


class Certificate:
    """The certificate of one graph, for any number of budgets: programs are kept, and only their budget changes."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self._simulator = graph, Simulator(graph)
        self.cuts = Cuts(graph, self._simulator)
        live = self._simulator.run(range(len(graph.ops))).live_bytes
        self._unit = max(1, int(live.max(initial=0))) / SCALE
        self.watch_points = WatchPoints(graph, live)
        self._relaxations: dict[tuple[CutSet, CutSet], Relaxation] = {}

    def bound(self, budget_bytes: int, cuts: CutSet, work: Work, *, gap: float = 0.0, relax: bool, known_ns: int = 0) -> Bound:
        """The least time of the relaxation with these cuts, in linear programs (`relax`) or in integers.

        Args:
            budget_bytes: bound on the live bytes at every step.
            cuts: ops at whose first run everything alive must fit.
            work: what may be spent; the bound is valid whenever it stops.
            gap: how exact, as a fraction of the plain step's time.
            relax: drop integrality.
            known_ns: what fewer cuts proved. A program whose linear optimum is lower gets the rows of `Relaxation.tie`.
        """
        wants_candidate = len(cuts) == 1 or not relax
        if self.graph.in_flight > 1:  # what is saved counts everywhere
            cuts = _together(*cuts, self.graph.num_forward_ops - 1)
        relaxation = self._relaxation(cuts, () if relax else self.watch_points.after(cuts[0], budget_bytes))
        relaxation.model.upper(relaxation.budget, budget_bytes * (1 + _TOLERANCE) / self._unit)
        bound_only = bool(self.watch_points.heavy) and len(cuts) > 1
        if known_ns and not relaxation.is_tied:
            linear = relaxation.model.solve(work, relax=True)
            if linear.status == "optimal" and self._time_ns(linear.bound) < known_ns:
                relaxation.tie()
        answer = relaxation.model.solve(work, gap=gap * SCALE, relax=relax, prove=bound_only)
        candidate = self._candidate(relaxation, cuts, answer.values) if answer.values and wants_candidate else None
        return Bound(self._time_ns(answer.bound), candidate, answer.status in ("optimal", "infeasible", "failed"))

    def _time_ns(self, objective: float) -> int:
        """What a bound of a program's objective says of the step's time, in whole nanoseconds."""
        extra, plain = max(0.0, objective / SCALE), max(1, self.graph.plain_ns)
        more = NEVER_NS if math.isinf(extra) else max(0, math.ceil(extra * plain * (1 - _TOLERANCE) - plain * 1e-9 - 1e-3))
        return plain + more

    def first_cuts(self, budget_bytes: int, best: int) -> CutSet:
        """Cuts for the first round in integers: the best single cut, and ops that leave next to no room for anything else."""
        return _together(best, *self._crowded(budget_bytes))

    def next_cuts(self, budget_bytes: int, cuts: CutSet, candidate: Schedule | None) -> CutSet:
        """The cuts of the next round: where the candidate breaks the budget; the same ones where nothing is left to say."""
        middle = self.watch_points.middle(cuts[0], budget_bytes)
        more = middle if middle and len(cuts) == 1 else self._broken(budget_bytes, cuts, candidate)
        return _together(*cuts, *more)

    def _crowded(self, budget_bytes: int) -> list[int]:
        """Ops that leave so little of the budget that next to nothing else is alive there: such cuts make a program easy."""
        needs = least_bytes(self.graph)
        order = np.argsort(-needs, kind="stable").tolist()
        return _apart((p for p in order if needs[p] >= (1 - SLACK) * budget_bytes), 2 * FEW)

    def _broken(self, budget_bytes: int, cuts: CutSet, candidate: Schedule | None) -> list[int]:
        """Ops to cut at next: where the candidate breaks the budget, or before the first cut, where reruns were free."""
        if candidate is None:
            return []
        first, again = self._excess(candidate, budget_bytes)
        over = [*sorted(first, key=lambda p: (-first[p], p)), *sorted(again, key=lambda p: (-again[p], p))[:1]]
        chosen = _apart((p for p in over if p not in cuts), FEW - 1)
        return chosen or _apart((p for p in self.cuts.ranked(budget_bytes) if p <= cuts[0] - FEW), 1)

    def _excess(self, schedule: Schedule, budget_bytes: int) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes over the budget at the first runs of ops, and at reruns for the op that follows."""
        excess = self._simulator.run(schedule.steps).live_bytes - budget_bytes
        first: dict[int, int] = {}
        again: dict[int, int] = {}
        forward_end = following = self.graph.num_forward_ops
        for t in range(len(schedule.steps) - 1, -1, -1):
            is_first = t < forward_end or schedule.steps[t] >= forward_end
            following = schedule.steps[t] if is_first else following
            if excess[t] > 0:
                where = first if is_first else again
                where[following] = max(where.get(following, 0), int(excess[t]))
        return first, again

    def _candidate(self, relaxation: Relaxation, cuts: CutSet, values: tuple[float, ...]) -> Schedule:
        """The schedule with that alive at the cuts which the answer has."""
        forward_end = self.graph.num_forward_ops
        held = [{name for name, column in alive.items() if values[column] > 0.5} for alive in relaxation.alive]
        for cut, names in zip(cuts, held, strict=True):  # the forward goes on after a cut in it
            names.update(name for op in self.graph.ops[cut:forward_end] for name in op.writes)
        in_forward = [names for cut, names in zip(cuts, held, strict=True) if cut < forward_end]
        kept = in_forward[-1] if in_forward else held[0]
        later = {cut: names for cut, names in zip(cuts, held, strict=True) if cut >= forward_end}
        return lazy_schedule(self.graph, kept, later)

    def _relaxation(self, cuts: CutSet, watched: CutSet) -> Relaxation:
        if (cuts, watched) not in self._relaxations:
            graph, unit, heavy = self.graph, self._unit, self.watch_points.heavy
            self._relaxations[cuts, watched] = (
                RelaxationWithWatchPoints(graph, cuts, unit, heavy, watched) if watched else Relaxation(graph, cuts, unit)
            )
        return self._relaxations[cuts, watched]


def _apart(cuts: Iterable[int], most: int) -> list[int]:
    """The first few of these that are not too near to each other."""
    chosen: list[int] = []
    for cut in cuts:
        if len(chosen) < most and all(abs(cut - other) >= FEW for other in chosen):
            chosen.append(cut)
    return chosen


def _together(*cuts: int) -> CutSet:
    return tuple(sorted(set(cuts)))
