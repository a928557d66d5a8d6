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
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from planner.graph.graph import Graph, Kind
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.solver import backend
from planner.solver.cuts import Cuts
from planner.solver.floor import least_bytes

_SCALE = 1e4
_SLACK = 1e-6
"""Relative slack given to the budget and taken from the bound, above the solver's tolerances."""
_NEVER = 2**62
"""Nanoseconds added where the relaxation has no solution at all: nothing fits."""
_FIRST, _SCANNED = 3, 20
"""Single cuts that are tried at once, and in a thorough search."""
_ADDED = 20
"""Of these the best, and those nearest to the very best, are tried as further cuts."""
_MORE_CUTS = 3
_HOT, _APART = 8, 3
"""Ops that need most by themselves, and how far apart, as cuts besides the best."""

Phases = tuple[tuple[int, frozenset[str]], ...]
"""Cuts, and the values alive at each."""

Effort = Literal["first", "linear", "exact", "thorough"]


class Bounds:
    """The certificate of one graph, for any number of budgets: programs are kept and only their budget changes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.plain_ns = sum(op.cost_ns for op in graph.ops)
        self.cuts = Cuts(graph)
        self._unit = max(1, simulate(graph, keep_all(graph)).peak_bytes) / _SCALE
        self._models: dict[tuple[int, ...], _Model] = {}
        self._known: dict[int, int] = {}
        self._hint: tuple[float, Phases] = (-1.0, ())

    def lower_bound(
        self,
        budget_bytes: int,
        *,
        effort: Effort = "exact",
        time_limit_s: float = 2.0,
        gap: float = 0.0001,
        tight: int | None = None,
        enough_ns: int | None = None,
    ) -> int:
        """No schedule with the captured backward order that fits `budget_bytes` takes less time than this, in ns.

        Args:
            budget_bytes: bound on the live bytes at every step.
            effort: "first": a linear program with one cut; "linear": with a few single cuts; "exact": and the best of them in
                integers; "thorough": and cuts all over the step, alone and several at once.
            time_limit_s: wall seconds; the bound is valid whenever it stops.
            gap: how exact, as a fraction of the plain step's time.
            tight: a backward op at which a good schedule's memory is tightest; one of the cuts tried.
            enough_ns: stop as soon as the bound has reached this.
        """
        plain = max(1, self.plain_ns)
        self._hint = (-1.0, ())
        # What holds for a larger budget holds for a smaller one.
        known_ns = max([ns for budget, ns in self._known.items() if budget >= budget_bytes], default=self.plain_ns)
        if enough_ns is not None and known_ns >= enough_ns:
            return known_ns
        enough = math.inf if enough_ns is None else enough_ns / plain - 1
        trials = _Trials(self, budget_bytes, gap, enough, time.monotonic() + time_limit_s)
        trials.search(effort, tight)
        if math.isinf(trials.best):
            return self.plain_ns + _NEVER
        extra = max(0, math.ceil(trials.best * plain * (1 - _SLACK) - plain * 1e-9 - 1e-3))  # times are whole nanoseconds
        self._known[budget_bytes] = max(known_ns, self.plain_ns + extra)
        return self._known[budget_bytes]

    @property
    def hint(self) -> Phases:
        """What is alive at the cuts of the best program of the last call: a schedule that keeps to it is near the bound."""
        return self._hint[1]

    def extra(self, budget_bytes: int, cuts: tuple[int, ...], *, time_limit_s: float, gap: float, relax: bool) -> float:
        """The least recompute time of the relaxation with these cuts, as a fraction of the plain step (inf: infeasible)."""
        if cuts not in self._models:
            self._models[cuts] = _Model(self.graph, cuts, self._unit)
        model = self._models[cuts]
        model.program.upper(model.budget, budget_bytes * (1 + _SLACK) / self._unit)
        answer = model.program.solve(time_limit_s=time_limit_s, gap=gap * _SCALE, relax=relax)
        found = max(0.0, answer.bound / _SCALE)
        if answer.values and found > self._hint[0] and (len(cuts) == 1 or not relax):
            held = [{name for name, column in alive.items() if answer.values[column] > 0.5} for alive in model.alive]
            for cut, names in zip(cuts, held, strict=True):  # the forward goes on after a cut in it
                names.update(name for op in self.graph.ops[cut : self.graph.num_forward_ops] for name in op.writes)
            self._hint = found, tuple(zip(cuts, map(frozenset, held), strict=True))
        return found


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

    def _ranked(self, count: int) -> list[tuple[int, ...]]:
        """The best sets of so many cuts, best first."""
        return sorted((cuts for cuts in self._found if len(cuts) == count), key=lambda cuts: -self._found[cuts])

    def search(self, effort: Effort, tight: int | None) -> None:
        """Single cuts; the best in integers; where thorough, more cuts, and one after the other added where it helps most."""
        promising = self._bounds.cuts.ranked(self._budget_bytes)
        for cut in promising[: 1 if effort == "first" else _FIRST]:
            self._run((cut,), self._half(), relax=True)
        ranked = self._ranked(1)
        # Where no single cut bites, several do not either.
        if not ranked or effort in ("first", "linear") or not 0 < self.best < self._enough:
            return
        self._run(ranked[0], self._half(), relax=False)
        if effort == "thorough":
            self._add_hot()
            self._scan(promising, tight)
            self._add_cuts()

    def _add_hot(self) -> None:
        """With the best cut, those ops that need most by themselves: near the floor nothing else is alive there."""
        needs = least_bytes(self._bounds.graph)
        hot: list[int] = []
        for cut in np.argsort(-needs, kind="stable").tolist():
            if all(abs(cut - other) >= _APART for other in hot):
                hot.append(cut)
            if len(hot) == _HOT:
                break
        first, until, reached, useless = self._ranked(1)[0], self._half(), self.best, 0
        for count in range(1, len(hot) + 1):
            self._run(_with(first, *hot[:count]), min(until, self._half()), relax=False)
            useless = 0 if self.best > reached + self._gap else useless + 1
            reached = self.best
            if useless == 2:
                return

    def _scan(self, promising: list[int], tight: int | None) -> None:
        """More single cuts: the most promising, those next to the best, and where a good schedule is tightest."""
        best = self._ranked(1)[0][0]
        near = sorted(promising, key=lambda cut: abs(cut - best))
        until = self._half()
        for cut in [*([tight] if tight is not None else []), *promising[:_SCANNED], *near[:_SCANNED]]:
            self._run((cut,), until, relax=True)
        self._run(self._ranked(1)[0], self._half(), relax=False)

    def _add_cuts(self) -> None:
        """To the best cuts, the one that helps most, up to a handful."""
        alone = [cuts[0] for cuts in self._ranked(1)]
        best = min((cuts for cuts in self._found if self._found[cuts] >= self.best - 10 * self._gap), key=len)
        near = sorted(alone, key=lambda cut: abs(cut - best[0]))
        for _ in range(_MORE_CUTS):
            until = self._half()
            for cut in dict.fromkeys([*near[:_ADDED], *alone[:_ADDED]]):
                if cut not in best:
                    self._run(_with(best, cut), until, relax=True)
            longer = [cuts for cuts in self._ranked(len(best) + 1) if set(best) < set(cuts)]
            if not longer:
                return
            best = longer[0]
            self._run(best, self._half(), relax=False)

    def _half(self) -> float:
        """Half of the time that is left."""
        return (time.monotonic() + self._deadline) / 2

    def _run(self, cuts: tuple[int, ...], deadline: float, *, relax: bool) -> None:
        left = deadline - time.monotonic()
        if left > 0.02 and self.best < self._enough and not (relax and cuts in self._found):
            extra = self._bounds.extra(self._budget_bytes, cuts, time_limit_s=left, gap=self._gap, relax=relax)
            self._found[cuts] = max(extra, self._found.get(cuts, 0.0))


def _with(cuts: tuple[int, ...], *others: int) -> tuple[int, ...]:
    return tuple(sorted({*cuts, *others}))


class _Model:
    """The relaxation with these cuts. `budget`: the column whose upper bound is the budget; `alive`: a_d, cut by cut."""

    def __init__(self, graph: Graph, cuts: Sequence[int], unit: float) -> None:
        program = backend.Program()
        self.budget = program.column(upper=None)
        plain = max(1, sum(op.cost_ns for op in graph.ops))
        pinned = graph.pinned
        self.alive: list[dict[str, int]] = []
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
            bytes_held = [(column, graph.value[name].nbytes / unit) for name, column in held.items()]
            program.row([*bytes_held, (self.budget, -1.0)], -_fixed(graph, cut) / unit)
            self.alive.append(held)
            alive, again = held, {i: program.column(graph.ops[i].cost_ns / plain * _SCALE) for i in rerun}
            reads = {name for op in graph.ops[cut:following] for name in op.reads if name not in pinned}
            for name in sorted(reads & held.keys()):
                here = [(held[name], -1.0)] if name in own else _pairs(graph, name, alive, again)
                program.row(here, -1.0)
            for i, column in again.items():
                for name in dict.fromkeys(graph.ops[i].reads):
                    if name in held:
                        program.row([(column, 1.0), *_pairs(graph, name, alive, again)], 0.0)
        self.program = backend.Model(program)


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
    given = (graph.value[name] for name in graph.inputs)
    resident = sum(value.nbytes for value in given if value.kind is not Kind.TANGENT or cut >= graph.num_forward_ops)
    handed_out = {name for name in outputs if name in graph.producer and graph.producer[name] <= cut}
    return resident + sum(graph.value[name].nbytes for name in handed_out.union(op.writes)) + op.workspace_bytes
