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
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.solver import backend
from planner.solver.baselines import crossing_bytes
from planner.solver.lifetimes import lifetimes

_MOST_SEGMENTS = 48
_LEVELS = 320
"""Steps of memory; `_ROOM` of them stand for the budget, for the count is on the careful side."""
_ROOM = 200
_MENU = 7

Costs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Dish:
    """One way to keep a segment's values: bytes kept, ops to run again before its backward, their time."""

    nbytes: int
    lane: tuple[int, ...]
    cost_ns: int


class Chain:
    """A graph cut into a chain of segments, and the table of its best schedules by memory."""

    def __init__(self, graph: Graph, budget_bytes: int, deadline: float) -> None:
        self.graph, self.life = graph, lifetimes(graph)
        self.unit = max(1.0, budget_bytes / _ROOM)
        self.bounds = _cut(graph)
        self.segments = [range(a, b) for a, b in pairwise(self.bounds)]
        self.backward = self._backward()
        self.forward_ns = [sum(graph.ops[i].cost_ns for i in segment) for segment in self.segments]
        self.enters = self._entering()
        self.menus = self._menus(deadline)
        self.complete = self._fill(deadline)

    def schedules(self) -> Iterator[list[int]]:
        """The best schedules for different amounts of memory, the cheapest first."""
        costs = self._best[0][-1]
        last = -1.0
        for m in range(len(costs) - 1, -1, -1):
            if np.isfinite(costs[m]) and costs[m] != last:
                last = float(costs[m])
                yield list(self._emit(0, len(self.segments) - 1, m, set()))

    def _backward(self) -> list[range]:
        """Per segment its backward ops: up to the last that reads one of its values."""
        life, graph = self.life, self.graph
        owner = np.searchsorted(self.bounds, life.producer, side="right") - 1
        ends, end = [], graph.num_forward_ops
        for s in range(len(self.segments) - 1, 0, -1):
            end = max(end, int(life.last_use[owner == s].max(initial=-1)) + 1)
            ends.append(end)
        starts = [graph.num_forward_ops, *ends]
        ranges = [range(a, b) for a, b in zip(starts, [*ends, len(graph.ops)], strict=True)]
        return ranges[::-1]

    def _entering(self) -> list[list[int]]:
        """[i][k]: steps of memory for what crosses into segment k and was made in segment i or later."""
        life = self.life
        size = life.nbytes / self.unit
        table = []
        for i in range(len(self.segments)):
            made = life.producer >= self.bounds[i]
            row = [0] * (i + 1)
            for k in range(i + 1, len(self.segments)):
                across = made & (life.producer < self.bounds[k]) & (life.last_forward >= self.bounds[k])
                row.append(int(np.ceil(size[across].sum())))
            table.append(row)
        return table

    def _menus(self, deadline: float) -> list[list[Dish]]:
        """A menu per segment; equal segments share the work."""
        known: dict[object, list[Dish]] = {}
        menus = []
        for segment in self.segments:
            key = self._signature(segment)
            if key not in known:
                known[key] = [
                    Dish(d.nbytes, tuple(i - segment.start for i in d.lane), d.cost_ns) for d in self._menu(segment, deadline)
                ]
            menus.append([Dish(d.nbytes, tuple(i + segment.start for i in d.lane), d.cost_ns) for d in known[key]])
        return menus

    def _signature(self, segment: range) -> object:
        """Equal for segments that look alike: costs, sizes, wiring, and which of their values the backward wants."""
        graph, ops = self.graph, []
        wanted = {name for i, name in enumerate(self.life.names) if self.life.last_use[i] >= 0}
        for i in segment:
            op = graph.ops[i]
            reads = tuple(graph.producer[n] - segment.start for n in op.reads if graph.producer.get(n, -1) >= segment.start)
            writes = tuple((graph.value[n].nbytes, n in wanted, n in graph.pinned) for n in op.writes)
            ops.append((op.cost_ns, op.recomputable, op.workspace_bytes, reads, writes))
        return tuple(ops)

    def _menu(self, segment: range, deadline: float) -> list[Dish]:
        """Kept sets that are best at some price of memory: the program without memory rows is integral, so linear."""
        graph, life = self.graph, self.life
        mine = [d for d in range(len(life.names)) if life.producer[d] in segment and life.last_forward[d] < segment.stop]
        again = sorted({int(life.producer[d]) for d in mine if graph.ops[int(life.producer[d])].recomputable})
        if not mine:
            return [Dish(0, (), 0)]
        rate = np.array([(graph.ops[int(life.producer[d])].cost_ns + 1) / max(1, int(life.nbytes[d])) for d in mine])
        prices = [0.0, *np.quantile(rate, np.linspace(0, 1, _MENU - 2)) * 1.01, float(rate.max()) * 1e3]
        dishes: dict[tuple[int, ...], Dish] = {}
        for price in prices:
            if dishes and time.monotonic() >= deadline:
                break
            dish = self._dish(mine, again, float(price))
            dishes.setdefault(dish.lane, dish)
        return list(dishes.values())

    def _dish(self, mine: list[int], again: list[int], price: float) -> Dish:
        graph, life = self.graph, self.life
        program = backend.Program()
        scale = 1e4 / (1 + sum(graph.ops[i].cost_ns for i in again))
        keep = {d: program.column(price * float(life.nbytes[d]) * scale + 1e-9) for d in mine}
        rerun = {i: program.column((graph.ops[i].cost_ns + 1) * scale) for i in again}
        index = {name: d for d, name in enumerate(life.names)}
        for d in mine:
            if life.first_use[d] < len(graph.ops):
                i = int(life.producer[d])
                program.row([(keep[d], -1.0), *((rerun[j], -1.0) for j in (i,) if j in rerun)], -1.0)
        for i, column in rerun.items():
            for d in (index[n] for n in dict.fromkeys(graph.ops[i].reads) if n in index):
                if d in keep:
                    j = int(life.producer[d])
                    program.row([(column, 1.0), (keep[d], -1.0), *((rerun[e], -1.0) for e in (j,) if e in rerun)], 0.0)
        values = backend.solve(program, time_limit_s=5.0, relax=True).values
        lane = tuple(i for i, column in rerun.items() if values[column] > 0.5)
        kept = sum(int(life.nbytes[d]) for d, column in keep.items() if values[column] > 0.5)
        return Dish(kept, lane, sum(graph.ops[i].cost_ns for i in lane))

    def _needs(self) -> tuple[list[int], list[int]]:
        """Per segment, steps of memory while its backward runs, and while its forward runs."""
        life = self.life
        during_backward, during_forward = [], []
        for segment, after in zip(self.segments, self.backward, strict=True):
            mine = (life.producer >= segment.start) & (life.producer < segment.stop)
            inside = [int(life.nbytes[mine & (life.last_use >= p)].sum()) for p in after]
            held = max((int(life.base[p]) + nbytes for p, nbytes in zip(after, inside, strict=True)), default=0)
            during_backward.append(int(np.ceil(held / self.unit)))
            during_forward.append(int(np.ceil(max(int(life.base[i]) for i in segment) / self.unit)))
        return during_backward, during_forward

    def _fill(self, deadline: float) -> bool:
        """The table, by length of the piece of chain; False where time was up."""
        count = len(self.segments)
        during_backward, during_forward = self._needs()
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
                    least = max(during_backward[i], during_forward[i])
                    later = self._best[i + 1][j] if length else np.zeros(_LEVELS)
                    less = int(np.ceil(dish.nbytes / self.unit)) + self.enters[i][i + 1] if length else 0
                    total = _with_less(later, less) + (self.forward_ns[i] + dish.cost_ns)
                    _take(best, choice, total, least, -1 - u)
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


def _cut(graph: Graph) -> list[int]:
    """Bounds of the segments: narrow places of the forward, about equally far apart in time."""
    turn = graph.num_forward_ops
    crossing = crossing_bytes(graph)[: max(0, turn - 1)]
    if not len(crossing):
        return [0, turn]
    typical = np.array([crossing[max(0, i - 12) : i + 13].min() for i in range(len(crossing))])
    narrow = np.flatnonzero(crossing <= 1.02 * typical)
    costs = np.cumsum([op.cost_ns + 1 for op in graph.ops[:turn]])
    cuts: list[int] = []
    for share in range(1, _MOST_SEGMENTS):
        near = narrow[np.abs(costs[narrow] / costs[-1] - share / _MOST_SEGMENTS).argmin()]
        if not cuts or near + 1 > cuts[-1]:
            cuts.append(int(near) + 1)
    return [0, *cuts, turn]
