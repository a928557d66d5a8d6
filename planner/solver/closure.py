"""The core program: which forward values to keep, so that the rest is recomputed at most once (formulation, section 1).

Columns: k_d, d is kept at the turn from forward to backward; r_i, op i runs again; the peak, at most
the budget. Rows for memory are added only where a solution was found to break them; where a plain row
cannot see what recomputation leaves alive, that moment gets an exact copy of the step's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Simulator, Timeline, simulate
from planner.solver import backend
from planner.solver.lazy import Moment, lazy_schedule, moments
from planner.solver.lifetimes import lifetimes

_SCALE = 1e4
"""The plain step's time in units of the objective, its peak in units of a memory row: solvers' tolerances are absolute."""
_ROWS_A_ROUND = 6
_COPIES_A_ROUND = 4
_MANY_COPIES = 4
"""From so many on, a program takes ten times as long in integers as without, and what is without is nearly all integer."""


@dataclass(slots=True)
class Copy:
    """What the exact copy of one moment's state knows of. It grows with what schedules were seen to do.

    Attributes:
        again: ops that had run again by then in some schedule, or were awaited by a value alive; no memory is counted for
            others that may have run.
        alive: values that were alive then; all others count only as far as k says.
        less: bytes by which its budget is smaller.
    """

    again: set[int]
    alive: set[int]
    less: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What the program ended with: the schedule that fits, if any, and whether it is the optimum within the gap."""

    schedule: Schedule | None
    status: backend.Status


class Closure:
    """One graph's program; `solve` may be called for several budgets."""

    def __init__(self, graph: Graph, pinned: Collection[str] = ()) -> None:
        """`pinned`: droppable values that are kept whatever the budget (too small to be worth a decision)."""
        self.graph, self.life = graph, lifetimes(graph)
        self.time_ns = max(1, sum(op.cost_ns for op in graph.ops))
        self.plain_peak = max(1, simulate(graph, keep_all(graph)).peak_bytes)
        self.index = {name: d for d, name in enumerate(self.life.names)}
        self.pinned = frozenset(self.index[name] for name in pinned if name in self.index)
        self._simulator = Simulator(graph)
        self._number = {v: self.index[name] for v, name in enumerate(self._simulator.names) if name in self.index}
        turn = graph.num_forward_ops
        self.writes: list[list[int]] = [[self.index[n] for n in op.writes if n in self.index] for op in graph.ops[:turn]]
        self.reads: list[list[int]] = [[self.index[n] for n in dict.fromkeys(op.reads) if n in self.index] for op in graph.ops]
        self.again = [i for i in range(turn) if self.life.first_need[i] < len(graph.ops) and graph.ops[i].recomputable]
        self._built: tuple[object, _Rows, backend.Model] | None = None
        self.rows: dict[int, int] = {}
        self.copies: dict[Moment, Copy] = {}
        self.whole = False  # recomputes are integer too: a fraction of one can buy a fraction of a copy's memory
        first_stage = min((int(s) for s in self.life.first_need), default=turn)
        if first_stage < len(graph.ops):
            self.rows[first_stage] = 0

    def solve(
        self,
        budget_bytes: int | None,
        *,
        deadline: float,
        gap: float,
        judge: Callable[[Schedule], Timeline] | None = None,
        hurried: bool = False,
        relax: bool = False,
    ) -> Found:
        """Solve, simulate, add what was broken, and again until the schedule fits.

        Args:
            budget_bytes: bound on the live bytes at every step; None looks for the lowest peak instead.
            deadline: of time.monotonic().
            gap: absolute, as a fraction of the plain step's time (of its peak where the lowest peak is looked for).
            judge: simulates the schedule where it counts (default: on this graph).
            hurried: return where only new copies can say what is broken: the last schedule judged is near. A later call
                goes on from there, with these copies.
            relax: solve linear programs, and round: most of their columns are integer anyway. Proves nothing.
        """
        judge = judge or (lambda schedule: simulate(self.graph, schedule))
        self.rows = dict.fromkeys(self.rows, 0)
        for copy in self.copies.values():
            copy.less = 0
        reached = -math.inf
        while True:
            rows, model = self._model(budget_bytes)
            seconds = deadline - time.monotonic()
            if relax or len(self.copies) < _MANY_COPIES:
                answer = model.solve(time_limit_s=seconds, gap=gap * _SCALE, relax=relax)
            else:
                answer = model.relax_and_fix(time_limit_s=seconds, gap=gap * _SCALE)
            if answer.status in ("infeasible", "unknown"):
                return Found(None, answer.status)
            kept = {name for d, name in enumerate(self.life.names) if answer.values[d] > 0.5}
            schedule = lazy_schedule(self.graph, kept)
            peak = judge(schedule).peak_bytes
            limit = budget_bytes or math.ceil(answer.values[rows.peak] * rows.unit + gap * self.plain_peak)
            if peak <= limit:
                return Found(schedule, answer.status)
            if relax and answer.bound - reached <= gap * _SCALE:
                return Found(None, "unknown")  # what is broken now, rounding broke
            reached = answer.bound
            known = self.knows()
            plain = self._add_rows(kept, limit)
            more = plain or self._add_copies(schedule, limit, peak)
            learnt = not plain and self.knows() != known
            if not more or (hurried and learnt) or time.monotonic() >= deadline:
                return Found(None, "unknown")

    def knows(self) -> object:
        """What was learnt so far; where a round leaves it as it is, another round says nothing new."""
        return self.whole, len(self.rows), tuple((len(copy.again), len(copy.alive)) for copy in self.copies.values())

    def _model(self, budget_bytes: int | None) -> tuple[_Rows, backend.Model]:
        """The program as it is now; built anew only where more than the budget has changed."""
        copies = tuple((m, len(copy.again), len(copy.alive), copy.less) for m, copy in sorted(self.copies.items()))
        key = (budget_bytes is None, self.whole, tuple(sorted(self.rows.items())), copies)
        if self._built is None or self._built[0] != key:
            rows = _Rows(self, budget_bytes)
            self._built = key, rows, backend.Model(rows.program)
        _, rows, model = self._built
        if budget_bytes is not None:
            model.upper(rows.peak, budget_bytes / rows.unit)
        return rows, model

    def _add_rows(self, kept: set[str], budget_bytes: int) -> bool:
        """Add rows for the ops of the plain step that are over the budget; False where none is."""
        excess_by_op = enumerate(self._plain_excess(kept, budget_bytes))
        over = {t: excess for t, excess in excess_by_op if excess > 0 and t not in self.rows}
        self.rows.update(dict.fromkeys(_spaced(over, len(self.graph.ops) // 20, _ROWS_A_ROUND), 0))
        return bool(over)

    def _add_copies(self, schedule: Schedule, budget_bytes: int, judged_peak: int) -> bool:
        """Add copies for the moments over the budget; False where nothing new can be said."""
        run = self._simulator.run(schedule.steps)
        live, steps, when = run.live_bytes.tolist(), np.array(schedule.steps), moments(self.graph, schedule)
        seen: dict[int, Copy] = {}
        for t in (t for t in when if live[t] > budget_bytes):
            later = steps[self.graph.num_forward_ops : t + 1]
            again = set(later[later < self.graph.num_forward_ops].tolist())
            held = run.value[(run.start <= t) & (run.end >= t)].tolist()
            alive = {self._number[v] for v in held if v in self._number}
            awaited = set(steps[t + 1 :][steps[t + 1 :] < self.graph.num_forward_ops].tolist())
            twins = {e for i in again for twin in self.life.twins[i] for e in twin.readers}
            again |= {i for i in awaited if i in twins or not alive.isdisjoint(self.reads[i])}
            seen[t] = Copy(again, alive)
        broken = {t: live[t] - budget_bytes for t, copy in seen.items() if self._grows(when[t], copy)}
        new = _spaced(broken, len(live) // 20, _COPIES_A_ROUND)
        for t in new:
            copy = self.copies.setdefault(when[t], seen[t])
            copy.again |= seen[t].again
            copy.alive |= seen[t].alive
        if new:
            return True
        if not self.whole:
            self.whole = True
            return True
        # What an op writes may be wanted by ops that a copy does not know of: the copy may say that it has run, for these.
        ran = set(steps[self.graph.num_forward_ops :].tolist())
        for copy in (self.copies[when[t]] for t in seen):
            beyond = {e for i in copy.again for d in self.writes[i] for e in self.life.readers[d] if e in ran} - copy.again
            copy.again |= beyond
            new += sorted(beyond)
        if new:
            return True
        # Every broken moment has its exact copy: what is left is rounding, or bytes that only the judge's graph shows.
        excess = judged_peak - budget_bytes
        self.rows = {t: less + excess for t, less in self.rows.items()}
        for copy in self.copies.values():
            copy.less += excess
        return max(self.rows.values(), default=budget_bytes) < budget_bytes // 20

    def _grows(self, moment: Moment, seen: Copy) -> bool:
        """The moment has no copy, or one that does not know of all that was seen."""
        known = self.copies.get(moment)
        return known is None or not (seen.again <= known.again and seen.alive <= known.alive)

    def _plain_excess(self, kept: set[str], budget_bytes: int) -> list[int]:
        """Per op of the plain step, by how much the plain row is broken."""
        life, turn = self.life, self.graph.num_forward_ops
        k = np.array([name in kept for name in life.names], dtype=bool)
        change = np.zeros(len(self.graph.ops) + 1, dtype=np.int64)
        lives = k & (np.maximum(life.last_use, turn - 1) > life.last_forward)
        np.add.at(change, life.last_forward[lives] + 1, life.nbytes[lives])
        np.add.at(change, np.maximum(life.last_use[lives], turn - 1) + 1, -life.nbytes[lives])
        held = life.base + np.cumsum(change[:-1])
        for p in self.graph.backward_ops:
            held[p] += sum(int(life.nbytes[d]) for d in self.reads[p] if not (k[d] and life.last_use[d] >= p))
        excess: list[int] = (held - budget_bytes).tolist()
        return excess


def _spaced(over: dict[int, int], distance: int, count: int) -> list[int]:
    """The worst few, no two of them close together."""
    chosen: list[int] = []
    for t in sorted(over, key=lambda t: -over[t]):
        if all(abs(t - other) > distance for other in chosen):
            chosen.append(t)
        if len(chosen) == count:
            break
    return chosen


class _Rows:
    """Writes the program of a Closure for one budget. Columns 0 .. len(names) - 1 are k."""

    def __init__(self, closure: Closure, budget_bytes: int | None) -> None:
        self.closure, self.life, self.graph = closure, closure.life, closure.graph
        self.unit = closure.plain_peak / _SCALE
        self.program = backend.Program()
        for d in range(len(self.life.names)):
            self.program.column(binary=d not in closure.pinned)
        # Where the peak is minimised, time only breaks ties.
        price = _SCALE / closure.time_ns * (1.0 if budget_bytes else 1e-6)
        # A free op must not run again for nothing; all of these prices together stay below one nanosecond.
        least = 0.5 / (1 + len(closure.again))
        costs = {i: max(least, self.graph.ops[i].cost_ns) * price for i in closure.again}
        self.r = {i: self.program.column(cost, binary=closure.whole) for i, cost in costs.items()}
        if budget_bytes:
            self.peak = self.program.column(upper=budget_bytes / self.unit)
        else:
            self.peak = self.program.column(1.0, upper=None)
        for d in sorted(closure.pinned):
            self.program.row([(d, -1.0)], -1.0)
        self._closure(self.r, len(self.graph.ops), {})
        for i in self.r if closure.whole else ():
            self._only_if_wanted(i, self.r, len(self.graph.ops))
        for t, less in sorted(closure.rows.items()):
            self._plain(t, less)
        for moment in sorted(closure.copies):
            self._copy(moment, closure.copies[moment])

    def _closure(self, again: dict[int, int], before: int, earlier: dict[int, int]) -> None:
        """k_d + r_pi(d) >= 1 for every d that a stage below `before` uses; r_i <= k_d + r_pi(d) for inputs d of i.

        `earlier` stands in for the ops that `again` has no column for.
        """
        life, pinned, either = self.life, self.closure.pinned, earlier | again
        own = {i: column for i, column in again.items() if again is self.r or column != self.r[i]}
        for d, i in enumerate(life.producer.tolist()):
            if d not in pinned and life.first_use[d] < before and (i in own or (again is self.r and i not in again)):
                self.program.row([(d, -1.0), *((own[e], -1.0) for e in (i,) if e in own)], -1.0)
        for i, column in again.items():
            for d in self.closure.reads[i]:
                j = int(life.producer[d])
                if j in self.r and j not in either:
                    continue  # a copy that does not know of j cannot say that it has not run
                if d not in pinned and (i in own or j in own):
                    self.program.row([(column, 1.0), (d, -1.0), *((either[e], -1.0) for e in (j,) if e in either)], 0.0)

    def _plain(self, t: int, less: int) -> None:
        """Memory at op t of the plain step, counting what is kept and what the op itself reads."""
        life, fixed = self.life, int(self.life.base[t])
        if t < self.graph.num_forward_ops:
            held = np.flatnonzero(life.last_forward < t)
        else:
            used = np.zeros(len(life.names), dtype=bool)
            used[self.closure.reads[t]] = True
            fixed += int(life.nbytes[used].sum())
            held = np.flatnonzero((life.last_use >= t) & ~used)
        pairs = [(int(d), float(life.nbytes[d]) / self.unit) for d in held]
        self._memory(pairs, fixed, less)

    def _memory(self, pairs: backend.Pairs, fixed: int, less: int) -> None:
        self.program.row([*pairs, (self.peak, -1.0)], -(fixed + less) / self.unit)

    def _copy(self, moment: Moment, copy: Copy) -> None:
        """The exact state at one moment: y_i, op i has run again by then (formulation, section 1, exact copies)."""
        life, graph, p, j = self.life, self.graph, moment.stage, moment.again
        by = self._run_again_by(p + 1, copy.again)
        done = by
        fixed = int(life.base[p])
        pairs: backend.Pairs = []
        if j >= 0:
            if j not in by:
                return
            before = self._run_again_by(p, copy.again, start=j, within=by)
            done = {i: column for i, column in by.items() if i < j} | before  # this lane has come as far as j
            own = graph.ops[p]
            fixed -= own.workspace_bytes + sum(graph.value[name].nbytes for name in own.writes)
            extra = graph.ops[j].workspace_bytes
            extra += sum(graph.value[name].nbytes for name in graph.ops[j].writes if name not in self.closure.index)
            extra += sum(int(life.nbytes[d]) for d in self.closure.writes[j] if life.last_use[d] < p)
            pairs += [(by[j], extra / self.unit), *((before[e], -extra / self.unit) for e in (j,) if e in before)]
        for i in (i for i in done if i != j):
            for twin in life.twins[i]:
                if twin.last_use >= p:
                    pairs.append((done[i], twin.nbytes / self.unit))
                else:
                    pairs += self._awaited([([(done[i], 1.0)], 1.0)], done, twin.nbytes, self._sure(twin.readers, p, copy))
        for d, size in enumerate(life.nbytes.tolist()):
            i = int(life.producer[d])
            if d in self.closure.pinned:
                fixed += size if life.last_use[d] >= p else 0
            elif j < 0 and d in self.closure.reads[p]:
                fixed += size
            elif life.last_use[d] >= p:
                pairs += self._available(d, by if i == j else done, size)
            elif d in copy.alive:
                # Here if it is kept, and if it will not be recomputed before the reader runs.
                later = [(self.r[i], -1.0), *((done[e], 1.0) for e in (i,) if e in done)] if i in self.r else []
                pairs += self._awaited([([(d, 1.0)], 1.0), (later, 0.0)], done, size, self._sure(life.readers[d], p, copy))
        self._memory(pairs, fixed, copy.less)

    def _run_again_by(
        self, before: int, among: set[int], start: int = 0, within: dict[int, int] | None = None
    ) -> dict[int, int]:
        """Columns y_i for i >= start: op i has run again for a stage below `before`, no earlier than it must."""
        total = self.r if within is None else within
        again: dict[int, int] = {}
        own: list[int] = []
        for i in self.closure.again:
            if i < start or i not in among or self.life.first_need[i] >= before:
                continue
            loose = [d for d in self.closure.writes[i] if d not in self.closure.pinned]
            if len(loose) == 1 and self.life.first_use[loose[0]] < before:
                again[i] = total[i]  # if it runs again at all, it has done so for this use
            else:
                again[i] = self.program.column(binary=self.closure.whole)
                own.append(i)
        self._closure(again, before, total)
        for i in own:
            self.program.row([(again[i], 1.0), (total[i], -1.0)], 0.0)
            self._only_if_wanted(i, again, before)
        return again

    def _only_if_wanted(self, i: int, again: dict[int, int], before: int) -> None:
        wanted = [self._wanted(d, again, before) for d in self.closure.writes[i] if d not in self.closure.pinned]
        self.program.row([(again[i], 1.0), *((column, -1.0) for column in wanted)], 0.0)

    def _wanted(self, d: int, again: dict[int, int], before: int) -> int:
        """A column that is 1 only where d is not kept, and a stage below `before` or an op that has run again wants it."""
        wanted = self.program.column()
        self.program.row([(wanted, 1.0), (d, 1.0)], 1.0)
        if self.life.first_use[d] >= before:
            readers = [e for e in self.life.readers[d] if e in self.r and self.life.first_need[e] < before]
            # An op that the copy does not know of may have run by now if it runs again at all.
            self.program.row([(wanted, 1.0), *((again.get(e, self.r[e]), -1.0) for e in readers)], 0.0)
        return wanted

    def _available(self, d: int, done: dict[int, int], size: int) -> backend.Pairs:
        """Bytes of a value that is alive once it is kept or has been recomputed."""
        i = int(self.life.producer[d])
        if i not in done:
            return [(d, size / self.unit)]
        if len([e for e in self.closure.writes[i] if e not in self.closure.pinned]) == 1:
            return [(d, size / self.unit), (done[i], size / self.unit)]
        either = self.program.column()  # kept, and recomputed along with a sibling, is still one instance
        self.program.row([(d, 1.0), (either, -1.0)], 0.0)
        self.program.row([(done[i], 1.0), (either, -1.0)], 0.0)
        return [(either, size / self.unit)]

    def _sure(self, readers: tuple[int, ...], p: int, copy: Copy) -> list[int]:
        """Of ops that the copy does not know of, those that may have run again by now do not count as awaited."""
        return [e for e in readers if e in self.r and (e in copy.again or self.life.first_need[e] > p)]

    def _awaited(
        self, here: list[tuple[backend.Pairs, float]], done: dict[int, int], size: int, readers: list[int]
    ) -> backend.Pairs:
        """Bytes of an instance that no stage uses any more: alive while one of these readers is still to run again.

        `here`: with such a reader, each of these sums comes to at most the limit beside it, or the instance is alive.
        """
        if not readers:
            return []
        alive = self.program.column()
        for e in readers:
            still = [(self.r[e], 1.0), *((done[f], -1.0) for f in (e,) if f in done)]
            for pairs, limit in here:
                self.program.row([*still, *pairs, (alive, -1.0)], limit)
        return [(alive, size / self.unit)]
