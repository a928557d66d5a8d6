"""Unequal blocks: dynamic programming over where to cut the forward and what each block keeps.

Right after the turn little memory is free, so the blocks whose backward comes first must be small; what they kept is gone
when the earlier ones have their turn, and these may be larger (on a long recurrent net: 1, 1, 2, 4, 6, 12, 20 steps).
`best[i]` is the least time to recompute for pieces i.. to the end, by the memory that is free when piece i starts: a block
(i, j) keeps what crosses its end and a dish of its menu, j.. goes on with the rest. Each value is recomputed at most once.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from planner.graph.schedule import Schedule
from planner.solver.lazy import lazy_schedule
from planner.solver.pieces import Dish, Pieces

MOST_PIECES = 100
_LENGTHS = (1, 2, 3, 5, 8, 13, 21)
"""Of a block, in pieces."""
_ROOM = 2000
"""Steps of memory that stand for the budget."""
ROOMS = tuple(n / 100 for n in range(97, 111))
"""Shares of the budget to have schedules for: what is a little over may lack only what a block cannot express."""
FINE = 0.001
"""And how much finer they may be where they are best."""

Costs = NDArray[np.float64]


class Blocks:
    """The table of one graph, cut into at most `MOST_PIECES`, and budget."""

    def __init__(self, pieces: Pieces, budget_bytes: int, deadline: float) -> None:
        """`pieces`: the graph's; their menus are worth sharing between budgets."""
        self.pieces = pieces
        self.unit = max(1, budget_bytes) / _ROOM
        self.levels = int(ROOMS[-1] * _ROOM) + 1
        self._choice: dict[int, list[tuple[int, Dish, int]]] = {}
        self._chosen: dict[int, NDArray[np.int64]] = {}
        self._best: dict[int, Costs] = {len(self.pieces): np.zeros(self.levels)}
        self.complete = self._fill(deadline)

    def schedule(self, room: float) -> Schedule | None:
        """The table's best schedule with this share of the budget, at most the largest of `ROOMS`; None where there is none."""
        level = min(round(room * _ROOM), self.levels - 1)
        return lazy_schedule(self.pieces.graph, self._kept(level)) if np.isfinite(self._best[0][level]) else None

    def _fill(self, deadline: float) -> bool:
        """The table, from the last piece to the first; False where time was up."""
        pieces, count = self.pieces, len(self.pieces)
        for i in range(count - 1, -1, -1):
            best, chosen = np.full(self.levels, np.inf), np.full(self.levels, -1, dtype=np.int64)
            choices: list[tuple[int, Dish, int]] = []
            for j in (i + length for length in _LENGTHS if i + length <= count):
                if time.monotonic() >= deadline:
                    return False
                least = int(np.ceil(pieces.need(i, j) / self.unit))
                if least >= self.levels:
                    break
                crossing = int(pieces.life.nbytes[pieces.crossing(i, j)].sum())
                for dish in pieces.menu(i, j):
                    less = round((dish.nbytes + crossing) / self.unit) if j < count else 0
                    total = np.full(self.levels, np.inf)
                    total[less:] = self._best[j][: max(0, self.levels - less)] + dish.cost_ns
                    total[:least] = np.inf
                    better = total < best
                    best[better], chosen[better] = total[better], len(choices)
                    choices.append((j, dish, less))
            self._best[i], self._chosen[i], self._choice[i] = best, chosen, choices
        return True

    def _kept(self, level: int) -> set[str]:
        """What the table's choice keeps with so much memory: all that no lane makes, and what crosses the ends of blocks."""
        pieces, life, i = self.pieces, self.pieces.life, 0
        again: set[int] = set()
        crossing = np.zeros(len(life.names), dtype=bool)
        while i < len(pieces):
            j, dish, less = self._choice[i][int(self._chosen[i][level])]
            again.update(dish.lane)
            crossing |= pieces.crossing(i, j)
            i, level = j, level - less
        return {name for d, name in enumerate(life.names) if crossing[d] or int(life.producer[d]) not in again}
