"""The rows of the program over kept sets: wiring, memory in the plain step, exact copies of single positions of the backward.

Columns: k_d, value d is kept at the end of the forward; r_i, op i runs again; the peak, at most the budget. With
pi(d) the op that writes d, s_d its bytes and m_t the bytes at step t that no decision changes:
- k_d + r_pi(d) >= 1 for every d that the backward reads,
- r_i <= k_d + r_pi(d) for every input d of an op i that may run again,
- at op t of the plain step: m_t + sum of s_d k_d over what is held across it + sum of s_d over what t reads <= peak.
Rows are added in place. A copy that learns more, integers and bytes taken from the budget make a new program.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.solver import backend
from planner.solver.backend import SCALE
from planner.solver.lazy import BackwardPosition
from planner.solver.lifetimes import lifetimes


class Instance:
    """A graph in the integers of the program.

    Attributes:
        life: of the values that need not be kept, which are numbered in its order.
        lowest: the peak is minimised instead of the time.
        plain_peak: of the plain step, in bytes.
        index: name of a value -> its number.
        pinned: numbers of values that are kept for every budget (too small to be worth a decision).
        writes, reads: for each forward op, and for each op: the numbers of the values it writes and reads.
        again: forward ops that may run again.
    """

    def __init__(self, graph: Graph, pinned: Collection[str], *, lowest: bool) -> None:
        self.graph, self.life, self.lowest = graph, lifetimes(graph), lowest
        self.plain_peak = max(1, simulate(graph, keep_all(graph)).peak_bytes)
        self.index = {name: d for d, name in enumerate(self.life.names)}
        self.pinned = frozenset(self.index[name] for name in pinned if name in self.index)
        forward = range(graph.num_forward_ops)
        self.writes: list[list[int]] = [[self.index[n] for n in graph.ops[i].writes if n in self.index] for i in forward]
        self.reads: list[list[int]] = [[self.index[n] for n in dict.fromkeys(op.reads) if n in self.index] for op in graph.ops]
        self.again = [i for i in forward if self.life.first_need[i] < len(graph.ops) and graph.ops[i].recomputable]


@dataclass(slots=True)
class Copy:
    """What the exact copy of the state at one position knows of. It grows with what schedules were seen to do.

    Attributes:
        again: ops that had run again by then in some schedule, or were awaited by a value alive; no memory is counted for
            others that may have run.
        alive: values that were alive then; all others count only as far as k says.
    """

    again: set[int]
    alive: set[int]


class Rows:
    """The program over kept sets. Columns 0 .. len(names) - 1 are k. Rows for memory are added; nothing is taken away."""

    def __init__(self, data: Instance, *, is_whole: bool, less: int) -> None:
        """Write the program without rows for memory.

        Args:
            data: what it is written of.
            is_whole: recomputes are integer, too: a fraction of one can buy a fraction of a copy's memory.
            less: bytes that every row for memory takes from the budget.
        """
        self.data, self.life, self.graph = data, data.life, data.graph
        self.is_whole, self._less = is_whole, less
        self.unit = data.plain_peak / SCALE
        self.program = backend.Program()
        self.model = backend.Model(self.program)
        for d in range(len(self.life.names)):
            self.program.column(binary=d not in data.pinned)
        # Where the lowest peak is looked for, time only breaks ties.
        price = SCALE / max(1, data.graph.plain_ns) * (1e-6 if data.lowest else 1.0)
        # A free op must not run again for nothing; all of these prices together stay below one nanosecond.
        least = 0.5 / (1 + len(data.again))
        costs = {i: max(least, self.graph.ops[i].cost_ns) * price for i in data.again}
        self.r = {i: self.program.column(cost, binary=is_whole) for i, cost in costs.items()}
        self.peak = self.program.column(1.0 if data.lowest else 0.0, upper=math.inf)
        for d in sorted(data.pinned):
            self.program.row([(d, -1.0)], -1.0)
        self._wiring(self.r, len(self.graph.ops), {})
        for i in self.r if is_whole else ():
            self._only_if_wanted(i, self.r, len(self.graph.ops))

    def plain(self, t: int) -> None:
        """Add memory at op t of the plain step, counting what is kept and what the op itself reads."""
        life, fixed = self.life, int(self.life.base[t])
        if t < self.graph.num_forward_ops:
            held = np.flatnonzero(life.last_forward < t)
        else:
            used = np.zeros(len(life.names), dtype=bool)
            used[self.data.reads[t]] = True
            fixed += int(life.nbytes[used].sum())
            held = np.flatnonzero((life.last_use >= t) & ~used)
        self._memory([(int(d), float(life.nbytes[d]) / self.unit) for d in held], fixed)

    def _memory(self, pairs: backend.Pairs, fixed: int) -> None:
        self.program.row([*pairs, (self.peak, -1.0)], -(fixed + self._less) / self.unit)

    def _wiring(self, again: dict[int, int], before: int, earlier: dict[int, int]) -> None:
        """k_d + r_pi(d) >= 1 for every d that a stage below `before` uses; r_i <= k_d + r_pi(d) for inputs d of i.

        `earlier` stands in for the ops that `again` has no column for.
        """
        life, pinned, either = self.life, self.data.pinned, earlier | again
        own = {i: column for i, column in again.items() if again is self.r or column != self.r[i]}
        for d, i in enumerate(life.producer.tolist()):
            if d not in pinned and life.first_use[d] < before and (i in own or (again is self.r and i not in again)):
                self.program.row([(d, -1.0), *((own[e], -1.0) for e in (i,) if e in own)], -1.0)
        for i, column in again.items():
            for d in self.data.reads[i]:
                j = int(life.producer[d])
                if j in self.r and j not in either:
                    continue  # a copy that does not know of j cannot say that it has not run
                if d not in pinned and (i in own or j in own):
                    self.program.row([(column, 1.0), (d, -1.0), *((either[e], -1.0) for e in (j,) if e in either)], 0.0)

    def copy(self, position: BackwardPosition, copy: Copy) -> None:
        """Add the exact state at one position: y_i, op i has run again by then."""
        life, graph, p, j = self.life, self.graph, position.stage, position.again
        by = self._run_again_by(p + 1, copy.again)
        done = by
        fixed = int(life.base[p])
        pairs: backend.Pairs = []
        if j >= 0:
            if j not in by:
                return
            before = self._run_again_by(p, copy.again, start=j, within=by)
            done = {i: column for i, column in by.items() if i < j} | before  # the recompute set has run as far as j
            op = graph.ops[p]
            fixed -= op.workspace_bytes + sum(graph.value[name].nbytes for name in op.writes)
            extra = graph.ops[j].workspace_bytes
            extra += sum(graph.value[name].nbytes for name in graph.ops[j].writes if name not in self.data.index)
            extra += sum(int(life.nbytes[d]) for d in self.data.writes[j] if life.last_use[d] < p)
            pairs += [(by[j], extra / self.unit), *((before[e], -extra / self.unit) for e in (j,) if e in before)]
        for i in (i for i in done if i != j):
            for again in life.output_copies[i]:
                if again.last_use >= p:
                    pairs.append((done[i], again.nbytes / self.unit))
                else:
                    pairs += self._awaited([([(done[i], 1.0)], 1.0)], done, again.nbytes, self._sure(again.readers, p, copy))
        for d, size in enumerate(life.nbytes.tolist()):
            i = int(life.producer[d])
            if d in self.data.pinned:
                fixed += size if life.last_use[d] >= p else 0
            elif j < 0 and d in self.data.reads[p]:
                fixed += size
            elif life.last_use[d] >= p:
                pairs += self._available(d, by if i == j else done, size)
            elif d in copy.alive:
                # Here if it is kept, and if it will not be recomputed before the reader runs.
                later = [(self.r[i], -1.0), *((done[e], 1.0) for e in (i,) if e in done)] if i in self.r else []
                pairs += self._awaited([([(d, 1.0)], 1.0), (later, 0.0)], done, size, self._sure(life.readers[d], p, copy))
        self._memory(pairs, fixed)

    def _run_again_by(
        self, before: int, among: set[int], start: int = 0, within: dict[int, int] | None = None
    ) -> dict[int, int]:
        """Columns y_i for i >= start: op i has run again for a stage below `before`, no earlier than it must."""
        total = self.r if within is None else within
        again: dict[int, int] = {}
        own: list[int] = []
        for i in self.data.again:
            if i < start or i not in among or self.life.first_need[i] >= before:
                continue
            loose = [d for d in self.data.writes[i] if d not in self.data.pinned]
            if len(loose) == 1 and self.life.first_use[loose[0]] < before:
                again[i] = total[i]  # if it runs again at all, it has done so for this use
            else:
                again[i] = self.program.column(binary=self.is_whole)
                own.append(i)
        self._wiring(again, before, total)
        for i in own:
            self.program.row([(again[i], 1.0), (total[i], -1.0)], 0.0)
            self._only_if_wanted(i, again, before)
        return again

    def _only_if_wanted(self, i: int, again: dict[int, int], before: int) -> None:
        wanted = [self._wanted(d, again, before) for d in self.data.writes[i] if d not in self.data.pinned]
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
        if len([e for e in self.data.writes[i] if e not in self.data.pinned]) == 1:
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
        """Bytes of an instance that no backward op reads any more; it is alive while one of these readers has yet to run again.

        Adds the rows r_e - y_e + expression - alive <= limit, for each reader e and each (expression, limit) of `here`.
        """
        if not readers:
            return []
        alive = self.program.column()
        for e in readers:
            still = [(self.r[e], 1.0), *((done[f], -1.0) for f in (e,) if f in done)]
            for pairs, limit in here:
                self.program.row([*still, *pairs, (alive, -1.0)], limit)
        return [(alive, size / self.unit)]
