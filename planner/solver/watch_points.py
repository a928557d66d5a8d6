"""Heavy values that come and go many times: a stronger certificate where a few cuts cannot see that.

A recurrent net reads its embedded input in every time step, in the backward too. It may have to go after every read, but each
cut sees one of these. So between cuts there are watch points: ops at which the heavy value alone has columns of its own. Of the
others, what is read later and does not run again is alive there:
- c_{d,g} >= a_{d,g+1} - r_{pi(d),g}, and c_{d,g} >= 1 - R_pi(d) for d that is read after cut g + 1: d is held from cut to cut,
- at a watch point after cut g: what must be live while the op runs, s_d (1 - r_{pi(d),g}) for d that is read between it and cut
  g + 1, s_d c_{d,g} for the others and s_h for each heavy h that is alive fit the budget,
- h is alive that was alive at the watch point before, or its op has run since, which costs its time each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.solver import backend
from planner.solver.relaxation import Relaxation, fixed, readers, wanted
from planner.solver.tuning import FEW, SLACK

_OFTEN = 4 * FEW
"""How often the backward reads a value that is watched, at least; and how many of its reads after a cut are watch points."""


class WatchPoints:
    """Where to look, in one graph.

    Attributes:
        heavy: the values, most often none.
    """

    def __init__(self, graph: Graph, live_bytes: NDArray[np.int64]) -> None:
        """`live_bytes`: the plain step's, op by op."""
        self._live, peak, forward_end = live_bytes, int(live_bytes.max(initial=0)), graph.num_forward_ops
        self._reads = readers(graph)
        late = {name: sum(p >= forward_end for p in reads) for name, reads in self._reads.items()}
        self.heavy = tuple(name for name, count in late.items() if count >= _OFTEN and self._may_go(graph, name, peak))

    @staticmethod
    def _may_go(graph: Graph, name: str, peak: int) -> bool:
        i = graph.producer.get(name, len(graph.ops))
        heavy = graph.value[name].nbytes >= SLACK / 2 * peak
        return heavy and name not in graph.pinned and i < graph.num_forward_ops and graph.ops[i].recomputable

    def after(self, cut: int, budget_bytes: int) -> tuple[int, ...]:
        """The reads of heavy values after a cut, and the fullest ops between them, where the plain step is over the budget."""
        reads, between = self._after(cut, budget_bytes)
        return tuple(sorted({*reads, *between}))

    def middle(self, cut: int, budget_bytes: int) -> list[int]:
        """A second cut: in the middle of the watch points at which no heavy value is read, if there are any."""
        between = sorted(self._after(cut, budget_bytes)[1])
        return between[(len(between) - 1) // 2 :][:1]

    def _after(self, cut: int, budget_bytes: int) -> tuple[set[int], set[int]]:
        reads: set[int] = set()
        between: set[int] = set()
        for name in self.heavy:
            mine = [p for p in self._reads[name] if p > cut][:_OFTEN]
            reads.update(mine)
            between.update(p + 1 + int(self._live[p + 1 : q].argmax()) for p, q in pairwise([cut, *mine]) if q > p + 1)
        over = set(np.flatnonzero(self._live > budget_bytes).tolist())
        return reads & over, between & over


class RelaxationWithWatchPoints(Relaxation):
    """The program for these cuts and watch points."""

    def __init__(self, graph: Graph, cuts: Sequence[int], unit: float, heavy: Sequence[str], watched: Sequence[int]) -> None:
        to_the_last = {*wanted(graph, cuts[-1])[0]}
        by_maker = {graph.producer[name]: name for name in heavy if name in to_the_last}  # what one run makes is paid for once
        super().__init__(graph, cuts, unit, [name for i, name in by_maker.items() if i < cuts[0]])
        self.tie()
        self._crossing: list[dict[str, int]] = [{} for _ in cuts]
        inside = [[p for p in watched if interval.cut < p < interval.stop] for interval in self.intervals]
        alive_at = [{p: dict[str, int]() for p in ops} for ops in inside]
        for name in sorted(self.heavy):
            self._add_heavy(name, alive_at)
        for g, ops in enumerate(alive_at):
            for p, alive in ops.items():
                self._at_moment(p, g, alive)

    def _add_heavy(self, name: str, alive_at: list[dict[int, dict[str, int]]]) -> None:
        """Columns and rows of a heavy value h: a_{h,p}, alive at watch point p, and r_{h,p}, made again between p and the next.

        Args:
            alive_at: filled in; per cut and watch point after it, the a_{h,p} by value.
        """
        maker, program = self.graph.producer[name], self.program
        before: backend.Pairs = []
        for interval, ops in zip(self.intervals, alive_at, strict=True):
            runs: list[int] = []
            for p, following in pairwise([interval.cut, *ops, interval.stop]):
                alive = interval.alive[name] if p == interval.cut else program.column(binary=True)
                if before:  # a_{h,p+1} <= a_{h,p} + r_{h,p}
                    program.row([(alive, 1.0), *before], 0.0)
                if p != interval.cut:
                    ops[p][name] = alive
                    if self.next_read(name, p) == p:  # a_{h,p} >= 1
                        program.row([(alive, -1.0)], -1.0)
                runs.append(program.column(self.costs[maker], binary=True))
                before = [(alive, -1.0), (runs[-1], -1.0)]
                if self.next_read(name, p + 1) < following:  # a_{h,p} + r_{h,p} >= 1
                    program.row(before, -1.0)
            # r_{pi(h),g} is the most of the r_{h,p} after cut g: no more than their sum, no less than each
            program.row([(interval.again[maker], 1.0), *((column, -1.0) for column in runs)], 0.0)
            for column in runs:
                program.row([(column, 1.0), (interval.again[maker], -1.0)], 0.0)

    def _at_moment(self, p: int, g: int, alive: dict[str, int]) -> None:
        """The memory row of a watch point p after cut g: what is live while p runs fits the budget."""
        graph, interval = self.graph, self.intervals[g]
        held, pairs = fixed(graph, p), list[tuple[int, float]]()
        for name in wanted(graph, p)[0]:
            i, nbytes, read = graph.producer[name], graph.value[name].nbytes, self.next_read(name, p)
            if name in alive:
                pairs.append((alive[name], nbytes / self.unit))
            elif read == p or (read < len(graph.ops) and not graph.ops[i].recomputable):
                held += nbytes
            elif i in interval.again and read < interval.stop:
                held += nbytes
                pairs.append((interval.again[i], -nbytes / self.unit))
            elif i in interval.again and g + 1 < len(self.intervals):
                pairs += [(column, nbytes / self.unit) for column in self._crosses(name, g)]
        # what nothing can drop + sum of s_h a_{h,p} over heavy h + sum of s_d (1 - r_{pi(d),g}) over d read before cut g + 1
        # + sum of s_d c_{d,g} over other d + what the other forwards hold <= budget, with the constants on the right
        self.program.row([*pairs, *self.others, (self.budget, -1.0)], -held / self.unit)

    def _crosses(self, name: str, g: int) -> list[int]:
        """c_{d,g}, where d is wanted at cut g + 1, with c_{d,g} >= a_{d,g+1} - r_{pi(d),g} and c_{d,g} >= 1 - R_pi(d)."""
        following, i = self.intervals[g + 1], self.graph.producer[name]
        if name not in following.alive:
            return []
        if name not in self._crossing[g]:
            column = self._crossing[g][name] = self.program.column()
            # a_{d,g+1} - r_{pi(d),g} <= c_{d,g}
            self.program.row([(following.alive[name], 1.0), (self.intervals[g].again[i], -1.0), (column, -1.0)], 0.0)
            if i in self.ever and self.next_read(name, following.cut) < len(self.graph.ops):
                self.program.row([(self.ever[i], -1.0), (column, -1.0)], -1.0)  # c_{d,g} >= 1 - R_{pi(d)}
        return [self._crossing[g][name]]
