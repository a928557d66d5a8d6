"""Which cuts may give a good certificate: an estimate of each, without a program.

While an op runs for the first time, what the plain step holds above the budget must have been dropped. The cheapest way,
counting for every value nothing but the op that makes it, is a fractional knapsack: values in order of time a byte. That is
close to the bound a cut gives, and takes microseconds instead of a tenth of a second.
"""

from __future__ import annotations

import numpy as np

from planner.graph.graph import Graph
from planner.graph.simulate import Simulator


class Cuts:
    """One graph's estimates, for any budget."""

    def __init__(self, graph: Graph, simulator: Simulator) -> None:
        run = simulator.run(range(len(graph.ops)))
        self._live, self._reads = run.live_bytes, simulator.reads
        loose = [i < graph.num_forward_ops and graph.ops[i].recomputable for i in run.start.tolist()]
        chosen = np.array(loose, dtype=bool) & ~simulator.outputs[run.value]
        self._value, self._start, self._end = run.value[chosen], run.start[chosen], run.end[chosen]
        self._size = simulator.nbytes[self._value].astype(np.float64)
        self._size[self._end >= graph.num_forward_ops] *= graph.in_flight  # what is saved, each forward in flight holds
        cost = np.array([graph.ops[i].cost_ns for i in self._start.tolist()], dtype=np.float64)
        together = np.zeros(len(graph.ops) + 1)
        np.add.at(together, self._start, self._size)  # what one run makes comes together
        rate = cost / np.maximum(1.0, together[self._start])
        order = np.argsort(rate, kind="stable")
        self._value, self._start, self._end = self._value[order], self._start[order], self._end[order]
        self._size, self._rate = self._size[order], rate[order]
        self._held = np.zeros(len(simulator.names), dtype=bool)
        self._known: dict[int, list[int]] = {}

    def ranked(self, budget_bytes: int) -> list[int]:
        """The ops at which the plain step is over the budget, by the estimate of their cut, best first."""
        if budget_bytes not in self._known:
            over = np.flatnonzero(self._live > budget_bytes).tolist()
            estimate = {p: self._estimate(p, float(self._live[p] - budget_bytes)) for p in over}
            self._known[budget_bytes] = sorted(over, key=lambda p: (-estimate[p], p))
        return self._known[budget_bytes]

    def _estimate(self, p: int, excess: float) -> float:
        """The least time, in ns, to recompute values of this many bytes that are alive at op p and not read by it."""
        own = list(self._reads[p])
        self._held[own] = True
        there = np.flatnonzero((self._start < p) & (self._end > p) & ~self._held[self._value])
        self._held[own] = False
        freed = np.cumsum(self._size[there])
        whole = int(np.searchsorted(freed, excess))
        ns = float((self._size[there[:whole]] * self._rate[there[:whole]]).sum())
        if whole == len(there):
            return ns
        before = float(freed[whole - 1]) if whole else 0.0
        return ns + (excess - before) * float(self._rate[there[whole]])
