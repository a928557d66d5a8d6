"""The certificate: a lower bound on the time of every schedule that fits, whatever it recomputes (formulation, section 2).

A cut is the moment at which an op runs for the first time. In captured order, everything before it
has run and nothing after it has. Columns: a_{d,g}, value d is alive at cut g; r_{i,g}, op i runs again
between cut g and the next (or the end). Whatever a schedule does, it obeys
- for a read of d, from cut g up to the next: a_{d,g} + r_{pi(d),g} >= 1,
- for every input d of an op that runs again: r_{i,g} <= a_{d,g} + r_{pi(d),g},
- for d alive at the next cut: a_{d,g+1} <= a_{d,g} + r_{pi(d),g},
- at the cut: what must be live while the op runs, and the values alive, fit the budget.
Ops that first run between two cuts may run again for nothing, and so may all ops before the first
cut: that makes the program a relaxation. It assumes the captured order of first runs and the given costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from planner.graph.graph import Graph, Kind
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.solver import backend

_SCALE = 1e4
_SLACK = 1e-6
"""Relative slack given to the budget and taken from the bound, above the solver's tolerances."""
_NEVER = 2**62
"""Nanoseconds added where the relaxation has no solution at all: nothing fits."""
_PAIRS = 6
"""Pairs of cuts, of the many that a thorough search relaxes, that are solved in integers."""


class Bounds:
    """The certificate of one graph, for any number of budgets: programs are kept and only their budget changes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.plain_ns = sum(op.cost_ns for op in graph.ops)
        self.first_cuts = _first_cuts(graph)
        self._unit = max(1, simulate(graph, keep_all(graph)).peak_bytes) / _SCALE
        self._models: dict[tuple[int, ...], tuple[backend.Model, int]] = {}
        self._known: dict[int, int] = {}

    def lower_bound(
        self,
        budget_bytes: int,
        *,
        time_limit_s: float = 2.0,
        gap: float = 0.0001,
        tight: int | None = None,
        enough_ns: int | None = None,
        thorough: bool = False,
    ) -> int:
        """No schedule with the captured backward order that fits `budget_bytes` takes less time than this, in ns.

        Args:
            budget_bytes: bound on the live bytes at every step.
            time_limit_s: wall seconds; the bound is valid whenever it stops.
            gap: how exact, as a fraction of the plain step's time.
            tight: a backward op at which a good schedule's memory is tightest; the second cut.
            enough_ns: stop as soon as the bound has reached this.
            thorough: try cuts all over the step, alone and several at once.
        """
        plain = max(1, self.plain_ns)
        # What holds for a larger budget holds for a smaller one.
        known_ns = max([ns for budget, ns in self._known.items() if budget >= budget_bytes], default=self.plain_ns)
        if enough_ns is not None and known_ns >= enough_ns:
            return known_ns
        enough = math.inf if enough_ns is None else enough_ns / plain - 1
        trials = _Trials(self, budget_bytes, gap, enough, time.monotonic() + time_limit_s)
        trials.search(tight, thorough=thorough)
        if math.isinf(trials.best):
            return self.plain_ns + _NEVER
        extra = max(0, math.ceil(trials.best * plain * (1 - _SLACK) - plain * 1e-9 - 1e-3))  # times are whole nanoseconds
        self._known[budget_bytes] = max(known_ns, self.plain_ns + extra)
        return self._known[budget_bytes]

    def extra(self, budget_bytes: int, cuts: tuple[int, ...], *, time_limit_s: float, gap: float, relax: bool) -> float:
        """The least recompute time of the relaxation with these cuts, as a fraction of the plain step (inf: infeasible)."""
        if cuts not in self._models:
            program, budget = _program(self.graph, cuts, self._unit)
            self._models[cuts] = backend.Model(program), budget
        model, budget = self._models[cuts]
        model.upper(budget, budget_bytes * (1 + _SLACK) / self._unit)
        answer = model.solve(time_limit_s=time_limit_s, gap=gap * _SCALE, relax=relax)
        return max(0.0, answer.bound / _SCALE)


def lower_bound(graph: Graph, budget_bytes: int, **settings: Any) -> int:
    """The certificate for one budget; see `Bounds.lower_bound`."""
    return Bounds(graph).lower_bound(budget_bytes, **settings)


class _Trials:
    """Bounds by different cuts.

    Attributes:
        best: the best bound so far, as a fraction of the plain step.
        ranked: all cuts tried, best first.
    """

    def __init__(self, bounds: Bounds, budget_bytes: int, gap: float, enough: float, deadline: float) -> None:
        self._bounds, self._budget_bytes, self._gap = bounds, budget_bytes, gap
        self._enough, self._deadline = enough, deadline
        self._found: dict[tuple[int, ...], float] = {}

    @property
    def best(self) -> float:
        return max(self._found.values(), default=0.0)

    @property
    def ranked(self) -> list[tuple[int, ...]]:
        return sorted(self._found, key=lambda cuts: -self._found[cuts])

    def search(self, tight: int | None, *, thorough: bool) -> None:
        """The first cuts; where thorough, cuts all over the step and several at once."""
        ops = self._bounds.graph.ops
        spread = range(self._bounds.graph.num_forward_ops, len(ops), max(1, len(self._bounds.graph.backward_ops) // 32))
        self.relaxed((cut,) for cut in dict.fromkeys([*self._bounds.first_cuts, *(spread if thorough else [])]))
        # Where no single cut bites, several do not either; where one is enough, the linear program settles it.
        if 0 < self.best < self._enough:
            self.exact([self.ranked[0]])
            if thorough:
                self.pairs(spread, tight)

    def pairs(self, cuts: Sequence[int], tight: int | None) -> None:
        """The best single cut with others, and the best of those pairs with a third."""
        first = self.ranked[0]
        self.relaxed(_with(first, cut) for cut in cuts)
        given = [_with(first, tight)] if tight is not None else []
        self.exact([*given, *self._distinct_pairs(_PAIRS)])
        best, after = self.ranked[0], [cut for cut in cuts if cut > first[0]]
        self.exact(_with(best, cut) for cut in after[:2])  # where one is tightest, its neighbours are nearly so

    def _distinct_pairs(self, count: int) -> list[tuple[int, ...]]:
        """The best pairs, one of those that are equally good: they cut at the same place."""
        found = {round(self._found[cuts], 6): cuts for cuts in reversed(self.ranked) if len(cuts) == 2}
        return [found[extra] for extra in sorted(found, reverse=True)[:count]]

    def relaxed(self, trials: Iterable[tuple[int, ...]]) -> None:
        """The linear programs, in at most half of the time."""
        now = time.monotonic()
        for cuts in list(trials):
            self._run(cuts, (now + self._deadline) / 2, relax=True)

    def exact(self, trials: Iterable[tuple[int, ...]]) -> None:
        """The programs in integers, each in an equal share of the time."""
        distinct = list(dict.fromkeys(trials))
        for n, cuts in enumerate(distinct):
            now = time.monotonic()
            self._run(cuts, now + (self._deadline - now) / (len(distinct) - n), relax=False)

    def _run(self, cuts: tuple[int, ...], deadline: float, *, relax: bool) -> None:
        left = deadline - time.monotonic()
        if left > 0 and self.best < self._enough:
            extra = self._bounds.extra(self._budget_bytes, cuts, time_limit_s=left, gap=self._gap, relax=relax)
            self._found[cuts] = max(extra, self._found.get(cuts, 0.0))


def _with(cuts: tuple[int, ...], *others: int) -> tuple[int, ...]:
    return tuple(sorted({*cuts, *others}))


def _first_cuts(graph: Graph, count: int = 3, among: int = 14) -> list[int]:
    """Backward ops that may make a good cut: where the plain step holds most, among the first stages and among all."""
    live = simulate(graph, keep_all(graph)).live_bytes
    order = sorted(graph.backward_ops, key=lambda p: (-live[p], p))
    early = [p for p in order if p < graph.num_forward_ops + among]
    return list(dict.fromkeys([*early[:count], *order[:1]]))


def _program(graph: Graph, cuts: Sequence[int], unit: float) -> tuple[backend.Program, int]:
    """The relaxation with these cuts, and the column whose upper bound is the budget."""
    program = backend.Program()
    budget = program.column()
    plain = max(1, sum(op.cost_ns for op in graph.ops))
    pinned = graph.pinned
    alive: dict[str, int] = {}
    again: dict[int, int] = {}
    for g, cut in enumerate(cuts):
        following = cuts[g + 1] if g + 1 < len(cuts) else len(graph.ops)
        wanted, rerun = _wanted(graph, cut)
        held = {name: program.column(binary=True) for name in wanted}
        if g > 0:
            for name in held:
                if graph.producer[name] < cuts[g - 1]:
                    program.row([(held[name], 1.0), *_pairs(graph, name, alive, again)], 0.0)
        own = set(graph.ops[cut].reads)
        fixed = _fixed(graph, cut)
        program.row(
            [*((column, graph.value[name].nbytes / unit) for name, column in held.items()), (budget, -1.0)],
            -fixed / unit,
        )
        alive, again = held, {i: program.column(graph.ops[i].cost_ns / plain * _SCALE) for i in rerun}
        reads = {name for op in graph.ops[cut:following] for name in op.reads if name not in pinned}
        for name in sorted(reads & held.keys()):
            program.row([(held[name], -1.0)] if name in own else _pairs(graph, name, alive, again), -1.0)
        for i, column in again.items():
            for name in dict.fromkeys(graph.ops[i].reads):
                if name in held:
                    program.row([(column, 1.0), *_pairs(graph, name, alive, again)], 0.0)
    return program, budget


def _pairs(graph: Graph, name: str, alive: dict[str, int], again: dict[int, int]) -> backend.Pairs:
    """-(a_d + r_pi(d)): the value is here, or its op runs again."""
    i = graph.producer[name]
    pairs = [(alive[name], -1.0)] if name in alive else []
    return [*pairs, (again[i], -1.0)] if i in again else pairs


def _wanted(graph: Graph, cut: int) -> tuple[list[str], list[int]]:
    """Values written before the cut that may be wanted after it, and the ops that may run again for them."""
    pinned = graph.pinned
    stack = sorted({name for op in graph.ops[cut:] for name in op.reads})
    values: set[str] = set()
    rerun: set[int] = set()
    while stack:
        name = stack.pop()
        if name in values or name in pinned or graph.producer[name] >= cut:
            continue
        values.add(name)
        i = graph.producer[name]
        if graph.ops[i].recomputable and i not in rerun:
            rerun.add(i)
            stack += graph.ops[i].reads
    return sorted(values, key=lambda name: (graph.producer[name], name)), sorted(rerun)


def _fixed(graph: Graph, cut: int) -> int:
    """Bytes live while the op at the cut runs for the first time that nothing can drop (its reads left aside)."""
    op = graph.ops[cut]
    outputs = {*graph.forward_outputs, *graph.backward_outputs}
    resident = sum(
        value.nbytes
        for value in graph.values
        if value.name in graph.inputs and (value.kind is not Kind.TANGENT or cut >= graph.num_forward_ops)
    )
    handed_out = {name for name in outputs if name in graph.producer and graph.producer[name] <= cut}
    return resident + sum(graph.value[name].nbytes for name in handed_out.union(op.writes)) + op.workspace_bytes
