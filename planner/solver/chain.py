"""Very low budgets: a chain of blocks, a menu for each distinct block, dynamic programming over the chain.

The forward is cut at its narrow places into segments 0..L-1. `best[i][j]` is the least time to run the forward of segments
i..j and then their backward, by the memory that is free, when what enters i is there (Beaumont et al. 2021, Rotor):
- run i..k-1 and keep only what crosses into k; then k..j; then i..k-1 once more from its start;
- run i and keep some of its values, as its menu says; then i+1..j; then recompute the rest of i and run its backward.
The recursion recomputes a segment as often as that pays, which no set of kept values can. Memory is counted roughly and in
steps; `simulate` judges the schedules that come out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.solver.pieces import Pieces

_MOST_SEGMENTS = 48
_LEVELS = 320
"""Steps of memory; `_ROOM` of them stand for the budget, for the count is on the careful side."""
_ROOM = 200

Costs = NDArray[np.float64]


class Chain:
    """A graph cut into a chain of segments, and the table of its best schedules by memory."""

    def __init__(self, graph: Graph, budget_bytes: int, deadline: float) -> None:
        self.graph, self.pieces = graph, Pieces(graph, _MOST_SEGMENTS)
        self.unit = max(1.0, budget_bytes / _ROOM)
        self.segments, self.backward = self.pieces.forward, self.pieces.backward
        self.forward_ns = [sum(graph.ops[i].cost_ns for i in segment) for segment in self.segments]
        self.enters = self._entering()
        self.menus = [self.pieces.menu(s, s + 1) for s in range(len(self.segments)) if time.monotonic() < deadline]
        self.complete = len(self.menus) == len(self.segments) and self._fill(deadline)

    def schedules(self) -> Iterator[list[int]]:
        """The best schedules for different amounts of memory, the cheapest first."""
        costs = self._best[0][-1]
        last = -1.0
        for m in range(len(costs) - 1, -1, -1):
            if np.isfinite(costs[m]) and costs[m] != last:
                last = float(costs[m])
                yield list(self._emit(0, len(self.segments) - 1, m, set()))

    def _entering(self) -> list[list[int]]:
        """[i][k]: steps of memory for what crosses into segment k and was made in segment i or later."""
        count, size = len(self.segments), self.pieces.life.nbytes / self.unit
        return [
            [0] * (i + 1) + [int(np.ceil(size[self.pieces.crossing(i, k)].sum())) for k in range(i + 1, count)]
            for i in range(count)
        ]

    def _fill(self, deadline: float) -> bool:
        """The table, by length of the piece of chain; False where time was up."""
        count = len(self.segments)
        needs = [int(np.ceil(self.pieces.need(s, s + 1) / self.unit)) for s in range(count)]
        base = self.pieces.life.base
        during_forward = [int(np.ceil(max(int(base[i]) for i in segment) / self.unit)) for segment in self.segments]
        self._best: list[list[Costs]] = [[np.full(_LEVELS, np.inf) for _ in range(count)] for _ in range(count)]
        self._choice = [[np.zeros(_LEVELS, dtype=np.int64) for _ in range(count)] for _ in range(count)]
        before = np.concatenate(([0.0], np.cumsum(self.forward_ns)))
        for length in range(count):
            for i in range(count - length):
                if time.monotonic() >= deadline:
                    return False
                j = i + length
                best, choice = self._best[i][j], self._choice[i][j]
                for u, dish in enumerate(self.menus[i]):
                    later = self._best[i + 1][j] if length else np.zeros(_LEVELS)
                    less = int(np.ceil(dish.nbytes / self.unit)) + self.enters[i][i + 1] if length else 0
                    total = _with_less(later, less) + (self.forward_ns[i] + dish.cost_ns)
                    _take(best, choice, total, needs[i], -1 - u)
                for k in range(i + 1, j + 1):
                    total = _with_less(self._best[k][j], self.enters[i][k]) + self._best[i][k - 1] + (before[k] - before[i])
                    _take(best, choice, total, max(during_forward[i:k]), k)
        return True

    def _emit(self, i: int, j: int, m: int, ran: set[int]) -> Iterator[int]:
        """The steps of the table's choice for segments i..j with m steps of memory; `ran`: what ran before."""
        choice = int(self._choice[i][j][m])
        stop = choice if choice > 0 else i + 1
        for segment in self.segments[i:stop]:
            yield from (op for op in segment if op not in ran or self.graph.ops[op].recomputable)
            ran.update(segment)
        if choice > 0:
            yield from self._emit(choice, j, m - self.enters[i][choice], ran)
            yield from self._emit(i, choice - 1, m, ran)
            return
        dish = self.menus[i][-1 - choice]
        if j > i:
            yield from self._emit(i + 1, j, m - int(np.ceil(dish.nbytes / self.unit)) - self.enters[i][i + 1], ran)
        yield from dish.lane
        yield from self.backward[i]


def _with_less(costs: Costs, less: int) -> Costs:
    """The same table with `less` steps of memory already taken."""
    if less <= 0:
        return costs
    moved = np.full(len(costs), np.inf)
    moved[less:] = costs[: max(0, len(costs) - less)]
    return moved


def _take(best: Costs, choice: NDArray[np.int64], total: Costs, least: int, code: int) -> None:
    """Where `total` is better and at least `least` steps are free, it is the choice."""
    better = total < best
    better[:least] = False
    best[better] = total[better]
    choice[better] = code
