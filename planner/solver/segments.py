"""Dynamic programming over the forward as a chain of pieces: where to cut it, what to keep, what to run once more.

Right after the forward little memory is free, so the runs of pieces whose backward comes first must be short; what they kept is
gone when the earlier ones run, and these may be longer (on a long recurrent net: 1, 1, 2, 4, 6, 12, 20 steps).
`best[i, j]` is the least time to recompute while the forward of pieces i..j - 1 and then their backward run, by the memory that
is free when what enters i is there. Two transitions:
- keep: run i..k - 1, keep what crosses into k and an option of the run (`planner.solver.pieces`); then k..j - 1; then
  recompute the rest of the run and run its backward,
- again: run i..k - 1 and keep only what crosses into k; then k..j - 1; then i..k - 1 once more from its start.
Without the second each value is recomputed at most once, and only j = end is needed. With it a piece is recomputed as often as
that pays, which no set of kept values can do; runs are single pieces there (after Rotor, Beaumont et al. 2021). Memory is
counted roughly and in steps; `simulate` evaluates the schedules that come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.graph.schedule import Schedule
from planner.solver.lazy import lazy_schedule
from planner.solver.pieces import Option, Pieces
from planner.solver.tuning import EVENT_UNITS, LEVELS
from planner.solver.work import Work

_LENGTHS = (1, 2, 3, 5, 8, 13, 21)
"""Of a run of pieces whose values are kept or recomputed once: every length up to 3, then about two thirds more each time."""

Costs = NDArray[np.float32]  # tables are many, and `simulate` evaluates them


@dataclass(frozen=True, slots=True)
class Choice:
    """A transition to piece `k`: keep an option, or (None) run the prefix again. `less`: steps of memory that it takes."""

    k: int
    option: Option | None
    less: int


@dataclass(slots=True)
class _Cell:
    """By steps of free memory: the least time, and which choice gives it (-1: none)."""

    best: Costs
    chosen: NDArray[np.int16]
    choices: list[Choice]

    def take(self, choice: Choice, costs: Costs, least: int) -> None:
        """Where `costs` is better and at least `least` steps are free, it is the choice."""
        better = costs < self.best
        better[:least] = False
        self.best[better], self.chosen[better] = costs[better], len(self.choices)
        self.choices.append(choice)


class Segments:
    """The table of one graph in pieces, for one budget."""

    def __init__(self, pieces: Pieces, budget_bytes: int, *, again: bool) -> None:
        """`again`: pieces may be recomputed more than once."""
        self.pieces, self._again = pieces, again
        self.unit = max(1, budget_bytes) / LEVELS
        self.levels = 2 * LEVELS  # up to twice the budget
        self._cells: dict[tuple[int, int], _Cell] = {}
        count = len(pieces)
        ends = range(count, 0, -1) if again else [count]
        self._todo = sorted(((i, j) for j in ends for i in range(j)), key=lambda cell: (cell[1] - cell[0], cell))[::-1]

    def fill(self, work: Work) -> bool:
        """Go on with the table; False where work is over before it is complete."""
        while self._todo:
            if work.is_over:
                return False
            i, j = self._todo.pop()
            self._cells[i, j] = self._cell(i, j, work)
        return True

    def schedule(self, factor: float) -> Schedule | None:
        """The table's best schedule with this share of the budget, at most twice; None where there is none."""
        level, end = min(round(factor * LEVELS), self.levels - 1), len(self.pieces)
        if not np.isfinite(self._cells[0, end].best[level]):
            return None
        choices = list(self._path(0, end, level))
        if any(choice.option is None for _, choice in choices):
            return Schedule(tuple(self._emit(0, end, level, set())))
        return lazy_schedule(self.pieces.graph, self._kept(choices))

    def _cell(self, i: int, j: int, work: Work) -> _Cell:
        pieces = self.pieces
        cell = _Cell(np.full(self.levels, np.inf, np.float32), np.full(self.levels, -1, np.int16), [])
        for k in (i + length for length in (_LENGTHS[:1] if self._again else _LENGTHS) if i + length <= j):
            least = self._steps(pieces.need(i, k))
            if least >= self.levels:
                break
            for option in pieces.options(i, k, work):
                kept = pieces.graph.in_flight * (option.nbytes + pieces.crossing_bytes(i, k))
                less = round(kept / self.unit) if k < j else 0
                cell.take(Choice(k, option, less), self._after(k, j, less) + option.cost_ns, least)
        for k in range(i + 1, j) if self._again else ():
            less = self._steps(pieces.crossing_bytes(i, k))  # an estimate: what others in flight hold of it is left out
            costs = self._after(k, j, less) + self._cells[i, k].best + pieces.forward_ns(i, k)
            cell.take(Choice(k, None, less), costs, self._steps(pieces.forward_bytes(i, k)))
        work.charge(EVENT_UNITS * self.levels / 10 * (1 + len(cell.choices)))
        return cell

    def _steps(self, nbytes: int) -> int:
        return int(np.ceil(nbytes / self.unit))

    def _after(self, k: int, j: int, less: int) -> Costs:
        """best[k, j] with `less` steps of memory already taken."""
        costs: Costs = np.full(self.levels, np.inf, np.float32)
        costs[less:] = self._cells[k, j].best[: max(0, self.levels - less)] if k < j else 0.0
        return costs

    def _choice(self, i: int, j: int, level: int) -> Choice:
        cell = self._cells[i, j]
        return cell.choices[int(cell.chosen[level])]

    def _path(self, i: int, j: int, level: int) -> Iterator[tuple[int, Choice]]:
        """The choices along the forward."""
        while i < j:
            choice = self._choice(i, j, level)
            yield i, choice
            i, level = choice.k, level - choice.less

    def _kept(self, choices: list[tuple[int, Choice]]) -> set[str]:
        """All that is not recomputed, and what crosses the ends of runs."""
        pieces, life = self.pieces, self.pieces.life
        again: set[int] = set()
        crossing = np.zeros(len(life.names), dtype=bool)
        for i, choice in choices:
            assert choice.option is not None
            again.update(choice.option.reruns)
            crossing |= pieces.crossing(i, choice.k)
        return {name for d, name in enumerate(life.names) if crossing[d] or int(life.producer[d]) not in again}

    def _emit(self, i: int, j: int, level: int, ran: set[int]) -> Iterator[int]:
        """The steps of the table's choices for pieces i..j - 1; `ran`: what ran before."""
        choice, pieces = self._choice(i, j, level), self.pieces
        run = pieces.ops(i, choice.k)
        yield from (op for op in run if op not in ran or pieces.graph.ops[op].recomputable)
        ran.update(run)
        if choice.k < j:
            yield from self._emit(choice.k, j, level - choice.less, ran)
        if choice.option is None:
            yield from self._emit(i, choice.k, level, ran)
            return
        yield from choice.option.reruns
        yield from pieces.backward(i, choice.k)
