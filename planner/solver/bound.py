"""The certificate: a lower bound on the time of every schedule that fits, whatever it recomputes (formulation, section 2).

`planner.solver.relaxation` has the program.

Which cuts? The best single one, by an estimate; then what is alive at the cuts of the program's answer makes a schedule, and
the ops at which that is over the budget are the next cuts. Where the schedule fits and takes no more than the bound, it is
optimal; on its way there it is a good place for local search to start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator
from planner.solver.cuts import Cuts
from planner.solver.floor import least_bytes
from planner.solver.lazy import lazy_schedule
from planner.solver.moments import Moments, RelaxationWithMoments
from planner.solver.relaxation import SCALE, Relaxation

_SLACK = 1e-6
"""Relative slack given to the budget and taken from the bound, above the solver's tolerances."""
_NEVER = 2**62
"""Nanoseconds added where the relaxation has no solution at all: nothing fits."""
_FIRST = 3
"""Single cuts that are tried at once."""
_ADDED, _APART = 2, 3
"""Cuts added at a time, and how far apart."""
_CROWDED, _MOST_CROWDED = 0.9, 8
"""Share of the budget that an op must need by itself to be a cut from the first round on, and how many may be."""
_ROUND_GAP, _SLOW_GAP = 0.0005, 0.001
"""How exact a round is, as a fraction of the plain step's time; and where values are watched between several cuts."""
_SLOW_S = 30.0
"""Seconds in which values can be watched between two cuts; one cut takes a few."""

Phases = tuple[tuple[int, frozenset[str]], ...]
"""Cuts, and the values alive at each."""

Effort = Literal["first", "linear", "exact", "thorough"]


class Bounds:
    """The certificate of one graph, for any number of budgets: programs are kept and only their budget changes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.plain_ns = sum(op.cost_ns for op in graph.ops)
        self.cuts = Cuts(graph)
        self._simulator = Simulator(graph)
        live = self._simulator.run(range(len(graph.ops))).live_bytes
        self._unit = max(1, int(live.max(initial=0))) / SCALE
        self._moments = Moments(graph, live)
        self._models: dict[tuple[tuple[int, ...], tuple[int, ...]], Relaxation] = {}
        self._known: dict[int, int] = {}
        self._hint: tuple[float, Phases] = (-1.0, ())
        self._best_cut: dict[int, int] = {}
        self._next: dict[int, tuple[int, ...]] = {}

    def lower_bound(
        self,
        budget_bytes: int,
        *,
        effort: Effort = "exact",
        time_limit_s: float = 2.0,
        gap: float = 0.0001,
        enough_ns: int | None = None,
    ) -> int:
        """No schedule with the captured backward order that fits `budget_bytes` takes less time than this, in ns.

        Args:
            budget_bytes: bound on the live bytes at every step.
            effort: "first": a linear program with one cut; "linear": with a few single cuts; "exact": and the best of them in
                integers; "thorough": and `refine` while it can.
            time_limit_s: wall seconds; the bound is valid whenever it stops.
            gap: how exact, as a fraction of the plain step's time.
            enough_ns: stop as soon as the bound has reached this.
        """
        plain = max(1, self.plain_ns)
        self._hint = (-1.0, ())
        known_ns = self.known_ns(budget_bytes)
        if enough_ns is not None and known_ns >= enough_ns:
            return known_ns
        enough = math.inf if enough_ns is None else enough_ns / plain - 1
        deadline = time.monotonic() + time_limit_s
        trials = _Trials(self, budget_bytes, gap, enough, deadline)
        trials.search(effort)
        found_ns = self._raised(budget_bytes, trials.best)
        if trials.best_cut is not None:
            self._best_cut[budget_bytes] = trials.best_cut
        while effort == "thorough" and time.monotonic() < deadline and (enough_ns is None or found_ns < enough_ns):
            more = self.refine(budget_bytes, time_limit_s=deadline - time.monotonic())
            found_ns = self.known_ns(budget_bytes)
            if not more:
                break
        return found_ns

    def _raised(self, budget_bytes: int, extra: float) -> int:
        """The bound in ns, with a recompute time of `extra` of the plain step proven."""
        plain = max(1, self.plain_ns)
        # Times are whole nanoseconds.
        more = _NEVER if math.isinf(extra) else max(0, math.ceil(extra * plain * (1 - _SLACK) - plain * 1e-9 - 1e-3))
        self._known[budget_bytes] = max(self.plain_ns + more, self.known_ns(budget_bytes))
        return self._known[budget_bytes]

    def known_ns(self, budget_bytes: int) -> int:
        """The best bound proven so far: what holds for a larger budget holds for a smaller one."""
        return max([ns for budget, ns in self._known.items() if budget >= budget_bytes], default=self.plain_ns)

    def refine(self, budget_bytes: int, *, time_limit_s: float) -> bool:
        """One more round: solve with the cuts at hand, in integers; where the answer's schedule breaks the budget, cut next.

        `lower_bound` must have been asked for the budget before; `known_ns` says what was proven.

        Returns:
            False where another round would say nothing new.
        """
        best = self._best_cut.get(budget_bytes)
        if best is None:
            return False
        cuts = self._next.get(budget_bytes) or _with(best, *self._crowded(budget_bytes))
        middle = self._moments.middle(cuts[0], budget_bytes)
        if len(cuts) == 1 and time_limit_s >= _SLOW_S:
            cuts = _with(*cuts, *middle)
        self._hint, deadline = (-1.0, ()), time.monotonic() + time_limit_s
        gap = _SLOW_GAP if self.slow and len(cuts) > 1 else _ROUND_GAP
        extra = self.extra(budget_bytes, cuts, time_limit_s=time_limit_s, gap=gap, relax=False)
        self._raised(budget_bytes, extra)
        if time.monotonic() >= deadline:
            return True  # with more time, these cuts may say more
        more = middle if middle and len(cuts) == 1 else self._broken(budget_bytes, cuts)
        self._next[budget_bytes] = _with(*cuts, *more)
        return bool(more)

    @property
    def slow(self) -> bool:
        """Rounds take long, and say much: some values are watched between cuts."""
        return bool(self._moments.heavy)

    def _crowded(self, budget_bytes: int) -> list[int]:
        """Ops that leave so little of the budget that next to nothing else is alive there: such cuts make a program easy."""
        needs = least_bytes(self.graph)
        order = np.argsort(-needs, kind="stable").tolist()
        return _apart((p for p in order if needs[p] >= _CROWDED * budget_bytes), _MOST_CROWDED)

    def _broken(self, budget_bytes: int, cuts: tuple[int, ...]) -> list[int]:
        """Ops to cut at next: where the hinted schedule breaks the budget, or before the first cut, where reruns were free."""
        schedule = self.hinted
        if schedule is None:
            return []
        first, again = self._excess(schedule, budget_bytes)
        over = [*sorted(first, key=lambda p: -first[p]), *sorted(again, key=lambda p: -again[p])[:1]]
        chosen = _apart((p for p in over if p not in cuts), _ADDED)
        earlier = (p for p in self.cuts.ranked(budget_bytes) if p <= cuts[0] - _APART)
        return chosen or _apart(earlier, 1)

    def _excess(self, schedule: Schedule, budget_bytes: int) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes over the budget at the first runs of ops, and at reruns for the op that follows."""
        excess = self._simulator.run(schedule.steps).live_bytes - budget_bytes
        first: dict[int, int] = {}
        again: dict[int, int] = {}
        turn = following = self.graph.num_forward_ops
        for t in range(len(schedule.steps) - 1, -1, -1):
            is_first = t < turn or schedule.steps[t] >= turn
            following = schedule.steps[t] if is_first else following
            if excess[t] > 0:
                where = first if is_first else again
                where[following] = max(where.get(following, 0), int(excess[t]))
        return first, again

    @property
    def hinted(self) -> Schedule | None:
        """A schedule with that alive at the cuts which the last call's best program has: hardly dearer than the bound."""
        turn, phases = self.graph.num_forward_ops, self._hint[1]
        if not phases:
            return None
        kept = [names for cut, names in phases if cut < turn][-1:] or [phases[0][1]]
        return lazy_schedule(self.graph, kept[0], {cut: names for cut, names in phases if cut >= turn})

    def extra(self, budget_bytes: int, cuts: tuple[int, ...], *, time_limit_s: float, gap: float, relax: bool) -> float:
        """The least recompute time of the relaxation with these cuts, as a fraction of the plain step (inf: infeasible)."""
        model = self._model(cuts, () if relax else self._moments.after(cuts[0], budget_bytes))
        model.program.upper(model.budget, budget_bytes * (1 + _SLACK) / self._unit)
        slow = self.slow and len(cuts) > 1
        answer = model.program.solve(time_limit_s=time_limit_s, gap=gap * SCALE, relax=relax, prove=slow)
        found = max(0.0, answer.bound / SCALE)
        if answer.values and found > self._hint[0] and (len(cuts) == 1 or not relax):
            held = [{name for name, column in alive.items() if answer.values[column] > 0.5} for alive in model.alive]
            for cut, names in zip(cuts, held, strict=True):  # the forward goes on after a cut in it
                names.update(name for op in self.graph.ops[cut : self.graph.num_forward_ops] for name in op.writes)
            self._hint = found, tuple(zip(cuts, map(frozenset, held), strict=True))
        return found

    def _model(self, cuts: tuple[int, ...], moments: tuple[int, ...]) -> Relaxation:
        if (cuts, moments) not in self._models:
            graph, unit = self.graph, self._unit
            self._models[cuts, moments] = (
                RelaxationWithMoments(graph, cuts, unit, self._moments.heavy, moments)
                if moments
                else Relaxation(graph, cuts, unit)
            )
        return self._models[cuts, moments]


def lower_bound(graph: Graph, budget_bytes: int, **settings: Any) -> int:
    """The certificate for one budget; see `Bounds.lower_bound`."""
    return Bounds(graph).lower_bound(budget_bytes, **settings)


class _Trials:
    """Bounds by different cuts.

    Attributes:
        best: the best bound so far, as a fraction of the plain step.
    """

    def __init__(self, bounds: Bounds, budget_bytes: int, gap: float, enough: float, deadline: float) -> None:
        self._bounds, self._budget_bytes, self._gap = bounds, budget_bytes, gap
        self._enough, self._deadline = enough, deadline
        self._found: dict[tuple[int, ...], float] = {}

    @property
    def best(self) -> float:
        return max(self._found.values(), default=0.0)

    @property
    def best_cut(self) -> int | None:
        """The best single cut."""
        return max(self._found, key=lambda cuts: self._found[cuts])[0] if self._found else None

    def search(self, effort: Effort) -> None:
        """A few single cuts; the best in integers."""
        promising = self._bounds.cuts.ranked(self._budget_bytes)
        for cut in promising[: 1 if effort == "first" else _FIRST]:
            self._run((cut,), self._half(), relax=True)
        if self.best_cut is not None and effort not in ("first", "linear") and 0 < self.best < self._enough:
            self._run((self.best_cut,), self._half(), relax=False)

    def _half(self) -> float:
        """Half of the time that is left."""
        return (time.monotonic() + self._deadline) / 2

    def _run(self, cuts: tuple[int, ...], deadline: float, *, relax: bool) -> None:
        left = deadline - time.monotonic()
        if left > 0.02 and self.best < self._enough and not (relax and cuts in self._found):
            extra = self._bounds.extra(self._budget_bytes, cuts, time_limit_s=left, gap=self._gap, relax=relax)
            self._found[cuts] = max(extra, self._found.get(cuts, 0.0))


def _apart(cuts: Iterable[int], most: int) -> list[int]:
    """The first few of these that are not too near to each other."""
    chosen: list[int] = []
    for cut in cuts:
        if len(chosen) < most and all(abs(cut - other) >= _APART for other in chosen):
            chosen.append(cut)
    return chosen


def _with(*cuts: int) -> tuple[int, ...]:
    return tuple(sorted(set(cuts)))
