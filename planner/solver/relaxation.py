"""The certificate's program: what every schedule that fits obeys at a few cuts.

A cut is the moment at which an op runs for the first time. In captured order, everything before it
has run and nothing after it has. Columns: a_{d,g}, value d is alive at cut g; r_{i,g}, op i runs again
between cut g and the next (or the end); R_i, op i runs again at any time after the first cut. pi(d) is the op that makes d,
s_d are its bytes. Every schedule obeys
- for a read of d, from cut g up to the next: a_{d,g} + r_{pi(d),g} >= 1,
- for every input d of an op that runs again: r_{i,g} <= a_{d,g} + r_{pi(d),g},
- for d alive at the next cut: a_{d,g+1} <= a_{d,g} + r_{pi(d),g},
- R_i <= sum_g r_{i,g}; a_{d,0} + R_{pi(d)} >= 1 for every d that is read, R_i <= a_{d,0} + R_{pi(d)} for every input d,
  a_{d,g} + R_{pi(d)} >= 1 for every d that is read after cut g: without these, halves of a rerun in two intervals would do
  with half of an input,
- at the cut: what must be live while the op runs, the values alive and, of n forwards in flight, what the n - 1 others saved
  (the values alive at the last forward op, `planner.solver.forward_end`, where it is a cut) fit the budget.
With the a in integers the r are too, but HiGHS is twice as fast when it may branch on them.
Ops that first run between two cuts may run again for nothing, and so may all ops before the first
cut: that makes the program a relaxation. It assumes the captured order of first runs and the given costs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.solver import backend
from planner.solver.backend import SCALE


@dataclass(frozen=True, slots=True)
class Interval:
    """From a cut up to the next, or the end. `alive`: the a_d at the cut; `again`: the r_i from there on."""

    cut: int
    stop: int
    alive: dict[str, int]
    again: dict[int, int]


class Relaxation:
    """The program for these cuts.

    Attributes:
        budget: the column whose upper bound is the budget, in units of `unit` bytes.
        alive: a_d, cut by cut.
        others: what the other forwards in flight hold, in units of `unit` bytes, beside what is in `fixed`.
        ever: the R_i; without `tie` those of one cut.
    """

    def __init__(self, graph: Graph, cuts: Sequence[int], unit: float, heavy: Iterable[str] = ()) -> None:
        """`heavy`: values of which a subclass says how they get from cut to cut; only their columns are integers then."""
        self.graph, self.unit = graph, unit
        self.program = backend.Program()
        self.budget = self.program.column(upper=math.inf)
        plain = max(1, graph.plain_ns)
        self.costs = [op.cost_ns / plain * SCALE for op in graph.ops]
        self.intervals: list[Interval] = []
        self.heavy = frozenset(heavy)
        makers = {graph.producer[name] for name in self.heavy}
        for cut, stop in zip(cuts, [*cuts[1:], len(graph.ops)], strict=True):
            values, ops = wanted(graph, cut)
            alive = {name: self.program.column(binary=not heavy or name in self.heavy) for name in values}
            # runs of makers of heavy values are paid for watch point by watch point, by the subclass
            again = {i: self.program.column(0.0 if i in makers else self.costs[i], binary=not heavy) for i in ops}
            self.intervals.append(Interval(cut, stop, alive, again))
        self.alive = [interval.alive for interval in self.intervals]
        self._readers = readers(graph)
        saved = next((interval.alive for interval in self.intervals if interval.cut == graph.num_forward_ops - 1), {})
        others = graph.in_flight - 1
        self.others = [(column, others * graph.value[name].nbytes / unit) for name, column in saved.items() if others]
        for g, interval in enumerate(self.intervals):
            self._at_cut(interval)
            self._reads_and_inputs(interval)
            if g > 0:
                self._since(self.intervals[g - 1], interval)
        self.ever = self.intervals[0].again
        self.model = backend.Model(self.program)

    def here(self, interval: Interval, name: str) -> backend.Pairs:
        """-(a_d + r_pi(d)): the value is alive at the cut, or its op runs again after it."""
        i = self.graph.producer[name]
        pairs = [(interval.alive[name], -1.0)] if name in interval.alive else []
        return [*pairs, (interval.again[i], -1.0)] if i in interval.again else pairs

    def next_read(self, name: str, p: int) -> int:
        """The first op from p on that reads it; past the last op where none does."""
        reads = self._readers.get(name, [])
        k = bisect_left(reads, p)
        return reads[k] if k < len(reads) else len(self.graph.ops)

    def _reads_and_inputs(self, interval: Interval) -> None:
        """What is read after the cut, by first runs and by others, was alive at it or is made again."""
        reads = {name for op in self.graph.ops[interval.cut : interval.stop] for name in op.reads}
        for name in sorted(reads & interval.alive.keys()):  # a_{d,g} + r_{pi(d),g} >= 1; of `tie`, a_{d,0} + R_{pi(d)} >= 1
            self.program.row(self.here(interval, name), -1.0)
        for i, column in interval.again.items():
            for name in dict.fromkeys(self.graph.ops[i].reads):
                if name in interval.alive:  # r_{i,g} <= a_{d,g} + r_{pi(d),g}; of `tie`, R_i <= a_{d,0} + R_{pi(d)}
                    self.program.row([(column, 1.0), *self.here(interval, name)], 0.0)

    def _at_cut(self, interval: Interval) -> None:
        """What the op at the cut reads is alive, and what is alive fits the budget."""
        graph, alive = self.graph, interval.alive
        bytes_alive = [(column, graph.value[name].nbytes / self.unit) for name, column in alive.items()]
        # sum of s_d a_{d,g} + what the other forwards in flight hold + what nothing can drop <= budget
        self.program.row([*bytes_alive, *self.others, (self.budget, -1.0)], -fixed(graph, interval.cut) / self.unit)
        for name in dict.fromkeys(graph.ops[interval.cut].reads):
            if name in alive:  # a_{d,g} >= 1
                self.program.row([(alive[name], -1.0)], -1.0)

    def _since(self, before: Interval, interval: Interval) -> None:
        """What is alive at a cut was alive at the one before, or its op has run since; what was first made since is free."""
        for name, column in interval.alive.items():
            if name not in self.heavy and self.graph.producer[name] < before.cut:
                # a_{d,g} <= a_{d,g-1} + r_{pi(d),g-1}
                self.program.row([(column, 1.0), *self.here(before, name)], 0.0)

    @property
    def is_tied(self) -> bool:
        """The intervals are tied together."""
        return len(self.intervals) == 1 or self.ever is not self.intervals[0].again

    def tie(self) -> None:
        """Tie the intervals together: add the R_i with their rows. A larger program, whose linear optimum is higher."""
        if self.is_tied:
            return
        first, *others = self.intervals
        ever = self.ever = {i: self.program.column() for i in first.again}
        self._reads_and_inputs(Interval(first.cut, len(self.graph.ops), first.alive, ever))
        for i, column in ever.items():
            runs = [(interval.again[i], -1.0) for interval in self.intervals if i in interval.again]
            self.program.row([(column, 1.0), *runs], 0.0)  # R_i <= sum over g of r_{i,g}
        for interval in others:
            for name, column in interval.alive.items():
                i = self.graph.producer[name]
                if name not in self.heavy and i in ever and self.next_read(name, interval.cut) < len(self.graph.ops):
                    # a_{d,g} + R_{pi(d)} >= 1
                    self.program.row([(column, -1.0), (ever[i], -1.0)], -1.0)


def readers(graph: Graph) -> dict[str, list[int]]:
    """The ops that read each value, in order."""
    reads: dict[str, list[int]] = {}
    for p, op in enumerate(graph.ops):
        for name in dict.fromkeys(op.reads):
            reads.setdefault(name, []).append(p)
    return reads


def wanted(graph: Graph, cut: int) -> tuple[list[str], list[int]]:
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


def fixed(graph: Graph, cut: int) -> int:
    """Bytes live while the op at the cut runs for the first time that nothing can drop (its reads left aside)."""
    op = graph.ops[cut]
    outputs = {*graph.forward_outputs, *graph.backward_outputs}
    resident = graph.resident_bytes + (graph.tangent_bytes if cut >= graph.num_forward_ops else 0)
    resident += (graph.in_flight - 1) * sum(graph.value[n].nbytes for n in set(graph.forward_outputs) - set(graph.inputs))
    written = {name for name in outputs if name in graph.producer and graph.producer[name] <= cut}
    return resident + sum(graph.value[name].nbytes for name in written.union(op.writes)) + op.workspace_bytes
