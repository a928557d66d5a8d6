"""The forward cut at its narrow places into pieces, and for any run of pieces its options: ways to keep some of its values.

What crosses the end of a run is kept. Each option keeps a subset of the rest; the others are recomputed before the run's
backward. Without rows for memory that choice is a cut in a network, so its linear program is integral; the options are the
lower hull of its answers by bytes and time (a Pareto front), from all kept to as little as can be.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.solver import backend
from planner.solver.backend import SCALE
from planner.solver.baselines import crossing_bytes
from planner.solver.lifetimes import lifetimes
from planner.solver.tuning import FEW, NARROW
from planner.solver.work import Work

_ALMOST_FREE = 1e-9
"""A price that breaks ties for keeping nothing without need."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to keep a run's values: bytes kept, ops to run again before its backward, their time."""

    nbytes: int
    reruns: tuple[int, ...]
    cost_ns: int


class Pieces:
    """The pieces 0..len - 1 of a graph's forward; (i, j) stands for the run of pieces i..j - 1.

    Attributes:
        graph, life: what was cut, and its droppable values.
    """

    def __init__(self, graph: Graph, most: int) -> None:
        """`most`: pieces; fewer where there are fewer narrow places."""
        self.graph, self.life = graph, lifetimes(graph)
        self._bounds = _cut(graph, most)
        self._backward = self._backward_ops()
        self._index = {name: d for d, name in enumerate(self.life.names)}
        forward_end, known = graph.num_forward_ops, dict[object, int]()
        reads = [(i, d) for i in range(forward_end) for d in self.inputs(i)]
        self._reader, self._read = np.array(reads, dtype=np.int64).reshape(-1, 2).T
        self._kinds = np.array([known.setdefault(self._kind(i), len(known)) for i in range(forward_end)], dtype=np.int64)
        self._options: dict[tuple[bytes, ...], list[Option]] = {}

    def __len__(self) -> int:
        return len(self._backward)

    def ops(self, i: int, j: int) -> range:
        """The forward ops of the run."""
        return range(self._bounds[i], self._bounds[j])

    def backward(self, i: int, j: int) -> range:
        """The backward ops of the run: of each piece those up to the last that reads one of its values."""
        return range(self._backward[j - 1].start, self._backward[i].stop)

    def forward_ns(self, i: int, j: int) -> int:
        """Time of the run's forward."""
        return sum(self.graph.ops[op].cost_ns for op in self.ops(i, j))

    def forward_bytes(self, i: int, j: int) -> int:
        """The most that is live while the run's forward goes on, even if nothing of it is kept."""
        return int(self.life.base[self._bounds[i] : self._bounds[j]].max(initial=0))

    def crossing_bytes(self, i: int, j: int) -> int:
        """Of what `crossing` says."""
        return int(self.life.nbytes[self.crossing(i, j)].sum())

    def crossing(self, i: int, j: int) -> NDArray[np.bool_]:
        """Per droppable value: it is made in the run and read by the forward after it."""
        crosses: NDArray[np.bool_] = self._made(i, j) & (self.life.last_forward >= self._bounds[j])
        return crosses

    def need(self, i: int, j: int) -> int:
        """Bytes while the forward of the run goes on, and while its backward does with all of its values live."""
        life, ops = self.life, self.backward(i, j)
        made = self._made(i, j)
        order = np.argsort(life.last_use[made], kind="stable")
        last, gone = life.last_use[made][order], np.concatenate(([0], np.cumsum(life.nbytes[made][order])))
        held = life.base[ops.start : ops.stop] + gone[-1] - gone[np.searchsorted(last, np.arange(ops.start, ops.stop))]
        return max(int(held.max(initial=0)), self.forward_bytes(i, j))

    def options(self, i: int, j: int, work: Work) -> list[Option]:
        """Options for the run, that which keeps most first; runs that look alike share the work."""
        start, stop = self._bounds[i], self._bounds[j]
        key = self._signature(range(start, stop))
        if key not in self._options:
            options = self._hull(range(start, stop), work)
            self._options[key] = [Option(d.nbytes, tuple(op - start for op in d.reruns), d.cost_ns) for d in options]
        return [Option(d.nbytes, tuple(op + start for op in d.reruns), d.cost_ns) for d in self._options[key]]

    def inputs(self, i: int) -> list[int]:
        """The droppable values that an op reads."""
        return [self._index[name] for name in dict.fromkeys(self.graph.ops[i].reads) if name in self._index]

    def _kind(self, i: int) -> object:
        op, life = self.graph.ops[i], self.life
        made = [self._index[name] for name in op.writes if name in self._index]
        values = tuple((int(life.nbytes[d]), bool(life.first_use[d] < len(self.graph.ops))) for d in made)
        return op.cost_ns, op.recomputable, values, len(self.inputs(i))

    def _made(self, i: int, j: int) -> NDArray[np.bool_]:
        made: NDArray[np.bool_] = (self.life.producer >= self._bounds[i]) & (self.life.producer < self._bounds[j])
        return made

    def _backward_ops(self) -> list[range]:
        life, graph = self.life, self.graph
        owner = np.searchsorted(self._bounds, life.producer, side="right") - 1
        ends, end = [], graph.num_forward_ops
        for s in range(len(self._bounds) - 2, 0, -1):
            end = max(end, int(life.last_use[owner == s].max(initial=-1)) + 1)
            ends.append(end)
        starts = [graph.num_forward_ops, *ends]
        return [range(a, b) for a, b in zip(starts, [*ends, len(graph.ops)], strict=True)][::-1]

    def _signature(self, ops: range) -> tuple[bytes, ...]:
        """Equal for runs that look alike: costs, sizes, wiring, which values their backward wants and which go on."""
        life = self.life
        reads = slice(*np.searchsorted(self._reader, (ops.start, ops.stop)))
        made = slice(*np.searchsorted(life.producer, (ops.start, ops.stop)))
        within = np.maximum(self._read[reads] - made.start, -1)  # values are in the order of their makers
        goes_on = life.last_forward[made] >= ops.stop
        return self._kinds[ops.start : ops.stop].tobytes(), within.tobytes(), goes_on.tobytes()

    def _hull(self, ops: range, work: Work) -> list[Option]:
        """The extreme options, then those between two neighbours that are cheaper than a mixture of both."""
        program = _OptionProgram(self, ops, work)
        most, least = program.option(0.0), program.option(program.highest_price)
        found, between = {most.nbytes: most, least.nbytes: least}, deque([(most, least)])
        while between and len(found) < 3 * FEW:
            more, less = between.popleft()
            if more.nbytes <= less.nbytes:
                continue
            price = (less.cost_ns - more.cost_ns) / (more.nbytes - less.nbytes)
            option = program.option(price)
            mixed = more.cost_ns + price * (more.nbytes - option.nbytes)
            if less.nbytes < option.nbytes < more.nbytes and option.cost_ns < mixed - 1:
                found[option.nbytes] = option
                between += [(more, option), (option, less)]
        return [found[nbytes] for nbytes in sorted(found, reverse=True)]


class _OptionProgram:
    """The program of one run of pieces: which values to keep, at a price for every byte.

    Columns: k_d, value d is kept; r_i, op i runs again. pi(d) is the op that makes d.
    - for every d that the backward reads: k_d + r_{pi(d)} >= 1,
    - for every input d, made in these pieces, of an op that runs again: r_i <= k_d + r_{pi(d)}.
    """

    def __init__(self, pieces: Pieces, ops: range, work: Work) -> None:
        graph, life = pieces.graph, pieces.life
        self._graph, self._nbytes = graph, life.nbytes
        self._work = Work(meter=work.meter)  # half of the options would be another plan: a run takes little, and is finished
        made = (life.producer >= ops.start) & (life.producer < ops.stop) & (life.last_forward < ops.stop)
        mine = np.flatnonzero(made).tolist()
        again = sorted({int(life.producer[d]) for d in mine if graph.ops[int(life.producer[d])].recomputable})
        program = backend.Program()
        self._scale = SCALE / (1 + sum(graph.ops[i].cost_ns for i in again))
        self._keep = {d: program.column() for d in mine}
        self._again = {i: program.column((graph.ops[i].cost_ns + 1) * self._scale) for i in again}
        self.highest_price = 1.0 + sum(graph.ops[i].cost_ns + 1 for i in again)
        """Time that a byte is worth at which nothing is kept that could be recomputed."""
        for d in mine:
            if life.first_use[d] < len(graph.ops):  # k_d + r_{pi(d)} >= 1
                program.row(self._here(d, int(life.producer[d])), -1.0)
        for i, column in self._again.items():
            for d in pieces.inputs(i):
                if d in self._keep:  # r_i <= k_d + r_{pi(d)}
                    program.row([(column, 1.0), *self._here(d, int(life.producer[d]))], 0.0)
        self._model = backend.Model(program) if mine else None

    def _here(self, d: int, maker: int) -> backend.Pairs:
        """-(k_d + r_{pi(d)})."""
        return [(self._keep[d], -1.0), *((self._again[i], -1.0) for i in (maker,) if i in self._again)]

    def option(self, price: float) -> Option:
        """The best at so much time for every byte kept."""
        if self._model is None:
            return Option(0, (), 0)
        for d, column in self._keep.items():
            self._model.cost(column, price * int(self._nbytes[d]) * self._scale + _ALMOST_FREE)
        values = self._model.solve(self._work, relax=True).values
        if not values:  # the clock ended it; keeping everything is always one
            return Option(sum(int(self._nbytes[d]) for d in self._keep), (), 0)
        reruns = tuple(i for i, column in self._again.items() if values[column] > 0.5)
        kept = sum(int(self._nbytes[d]) for d, column in self._keep.items() if values[column] > 0.5)
        return Option(kept, reruns, sum(self._graph.ops[i].cost_ns for i in reruns))


def _cut(graph: Graph, most: int) -> list[int]:
    """Bounds of the pieces: narrow places of the forward, about equally far apart in time."""
    forward_end = graph.num_forward_ops
    crossing = crossing_bytes(graph)[: max(0, forward_end - 1)]
    if not len(crossing):
        return [0, forward_end]
    typical = np.array([crossing[max(0, i - 4 * FEW) : i + 4 * FEW + 1].min() for i in range(len(crossing))])
    narrow = np.flatnonzero(crossing <= NARROW * typical)
    costs = np.cumsum([op.cost_ns + 1 for op in graph.ops[:forward_end]])
    cuts: list[int] = []
    for share in range(1, most):
        near = narrow[np.abs(costs[narrow] / costs[-1] - share / most).argmin()]
        if not cuts or near + 1 > cuts[-1]:
            cuts.append(int(near) + 1)
    return [0, *cuts, forward_end]
