"""Checkmate's mixed-integer program (Jain et al. 2020), a reference for the tests: graphs larger than exhaustive search can do.

Written without the solver's own program, bounds and search, and without the simulator.

Time is cut into stages: stage t ends with the first run of op t (the frontier advances), and before that any op i < t may run
again, at most once, in captured order. The columns, with the paper's names:

    R[t, i]        op i runs in stage t; R[t, t] = 1
    S[t, v]        value v is carried into stage t (per value: an op may write several)
    FREE[t, v, k]  v dies in stage t right after op k, one of its readers or its writer
    U[t, k]        bytes live while op k runs in stage t, less what the whole stage holds
    V[t, v]        not in the paper: output v is still its first instance when stage t begins, which never dies

An instance is in stage t if it is carried in or written there. It serves its readers, or the next stage, until it is freed:

    R[t, j] + sum of FREE[t, v, k] over k < j  <=  S[t, v] + R[t, writer] + V[t + 1, v]     for every reader j
    S[t + 1, v] + sum of FREE[t, v, k]         <=  S[t, v] + R[t, writer]

which with FREE[t, v, k] <= R[t, k] has the same integer solutions as the paper's count of hazards, and a tighter relaxation.
An output's later instances are bytes of their own, carried by S; its first one is part of what the stage holds from then on.

The class is smaller than that of exhaustive search in two ways, both within one stage: there an op can run twice, and ops run
in any order, where the captured one may hold more at a time. So the optimum here can be above the true one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from planner.graph.graph import Graph, Kind
from planner.graph.schedule import Schedule
from planner.solver.backend import Program, Status, solve
from planner.solver.work import Work

_ONE = -1
"""A column that is the constant 1; None is the constant 0."""

Column = int | None
Terms = Iterable[tuple[Column, float]]


@dataclass(frozen=True, slots=True)
class Reference:
    """What the program says.

    Attributes:
        status: "optimal" (within the gap), "feasible" (out of work), "infeasible" (proven), "unknown".
        schedule: None unless optimal or feasible.
        time_ns: of the schedule; infinite without one.
        bound_ns: no schedule of the class takes less time.
        num_columns, num_rows: the size of the program.
    """

    status: Status
    schedule: Schedule | None
    time_ns: float
    bound_ns: float
    num_columns: int
    num_rows: int


def checkmate(
    graph: Graph, budget_bytes: int, *, backward_again: bool = False, effort: float = math.inf, gap: float = 1e-6
) -> Reference:
    """The cheapest schedule of the class within the budget.

    Args:
        graph: the joint graph.
        budget_bytes: bound on the live bytes at every step.
        backward_again: backward ops may run again too.
        effort: units of work that HiGHS may spend.
        gap: how far from the optimum to stop, as a fraction of the plain step's time.
    """
    model = _Model(graph, backward_again)
    for t in range(len(graph.ops)):
        model.add_stage(t)
    for t in range(len(graph.ops)):
        frees = model.add_lives(t)
        model.add_memory(t, budget_bytes, frees)
    answer = solve(model.program, Work(effort), gap=gap)
    steps = model.steps(answer.values) if answer.values else ()
    return Reference(
        status=answer.status,
        schedule=Schedule(steps) if answer.values else None,
        time_ns=sum(graph.ops[i].cost_ns for i in steps) if answer.values else float("inf"),
        bound_ns=sum(op.cost_ns for op in graph.ops) + answer.bound * model.time_unit,
        num_columns=len(model.program.costs),
        num_rows=len(model.program.rows),
    )


@dataclass(slots=True)
class _Model:
    graph: Graph
    backward_again: bool
    program: Program = field(default_factory=Program)
    runs: dict[tuple[int, int], int] = field(default_factory=dict)
    saved: dict[tuple[int, str], int] = field(default_factory=dict)
    first: dict[tuple[int, str], int] = field(default_factory=dict)
    reads: list[tuple[str, ...]] = field(init=False)
    readers: dict[str, list[int]] = field(init=False)
    outputs: frozenset[str] = field(init=False)
    time_unit: float = field(init=False)
    byte_unit: float = field(init=False)

    def __post_init__(self) -> None:
        ops = self.graph.ops
        self.reads = [tuple(name for name in dict.fromkeys(op.reads) if name in self.graph.producer) for op in ops]
        self.readers = {name: [] for name in self.graph.producer}
        for i, names in enumerate(self.reads):
            for name in names:
                self.readers[name].append(i)
        self.outputs = frozenset((*self.graph.forward_outputs, *self.graph.backward_outputs)) & self.graph.producer.keys()
        self.time_unit = float(max(1, sum(op.cost_ns for op in ops)))
        # HiGHS lets a row be missed by 1e-6: with the largest value at 1000 that is far below a byte up to a gigabyte.
        self.byte_unit = max(1.0, max((self.graph.value[name].nbytes for name in self.readers), default=0) / 1000)

    def size(self, name: str) -> float:
        return self.graph.value[name].nbytes / self.byte_unit

    def may_run(self, t: int, i: int) -> bool:
        """Op i < t may run again in stage t."""
        return self.graph.ops[i].recomputable and (self.backward_again or i < self.graph.num_forward_ops)

    def wanted(self, t: int) -> set[str]:
        """Values that somebody can read in stage t or later to a purpose."""
        names: set[str] = set()
        for i in range(len(self.graph.ops) - 1, -1, -1):
            if i >= t or (self.may_run(t, i) and not names.isdisjoint(self.graph.ops[i].writes)):
                names.update(self.reads[i])
        return names

    def add_stage(self, t: int) -> None:
        """R, S and V of stage t (V as the stage begins)."""
        wanted = self.wanted(t)
        for i in range(t):
            op = self.graph.ops[i]
            if self.may_run(t, i) and not wanted.isdisjoint(op.writes):
                self.runs[t, i] = self.program.column(op.cost_ns / self.time_unit, binary=True)
            for name in op.writes:
                again = name not in self.outputs or any((earlier, i) in self.runs for earlier in range(i + 1, t))
                if name in wanted and again:
                    self.saved[t, name] = self.program.column(binary=True)
        self.runs[t, t] = _ONE
        for name in sorted(self.outputs):
            writer = self.graph.producer[name]
            if writer == t:
                self.first[t + 1, name] = _ONE
            elif writer < t:
                self.first[t + 1, name] = self._still_first(t, name, writer)

    def _still_first(self, t: int, name: str, writer: int) -> int:
        if (t, writer) not in self.runs:
            return self.first[t, name]
        column = self.program.column()
        self.row([(column, 1), (self.first[t, name], -1)], 0)
        self.row([(column, 1), (self.runs[t, writer], 1)], 1)
        return column

    def add_lives(self, t: int) -> dict[int, list[tuple[Column, float]]]:
        """The rows of every value in stage t. Returns FREE with its bytes, by the op after which it frees."""
        frees: dict[int, list[tuple[Column, float]]] = {}
        for name, writer in self.graph.producer.items():
            if writer > t:
                continue
            run, carried = self.runs.get((t, writer)), self.saved.get((t, name))
            readers = [j for j in self.readers[name] if (t, j) in self.runs]
            there: list[tuple[Column, float]] = [(carried, -1), (run, -1)]
            freed: list[tuple[Column, float]] = []
            if t not in (*readers, writer) and (run, carried) != (None, None):
                for k in (writer, *readers):
                    if (t, k) in self.runs:
                        column = self.program.column()
                        self.row([(column, 1), (self.runs[t, k], -1)], 0)
                        frees.setdefault(k, []).append((column, self.size(name)))
                        freed.append((column, 1))
            before = (writer, *readers) if run is not None else readers
            for j in readers:
                gone = [term for k, term in zip(before, freed, strict=False) if k < j]
                self.row([(self.runs[t, j], 1), *gone, *there, (self.first.get((t + 1, name)), -1)], 0)
            self.row([(self.saved.get((t + 1, name)), 1), *freed, *there], 0)
        return frees

    def add_memory(self, t: int, budget_bytes: int, frees: dict[int, list[tuple[Column, float]]]) -> None:
        """U of stage t: carried in, plus what every run writes, less what the runs before it freed.

        Where op t holds less than is carried in, because it frees as it goes, U may exceed the budget at ops that do not run.
        """
        graph = self.graph
        held = sum(graph.value[name].nbytes for name in graph.inputs)
        if t < graph.num_forward_ops:
            held -= sum(value.nbytes for value in graph.values if value.kind is Kind.TANGENT)
        held += sum(graph.value[name].nbytes for name in self.outputs if graph.producer[name] < t)
        slots = [i for i in range(t + 1) if (t, i) in self.runs]
        live = [self.program.column(upper=math.inf) for _ in slots]
        carried = [(self.saved[t, name], self.size(name)) for name in graph.producer if (t, name) in self.saved]
        self.row([(live[0], -1), *carried, (self.runs[t, slots[0]], self._written(slots[0]))], 0)
        for (before, now), (k, i) in zip(pairwise(live), pairwise(slots), strict=True):
            gone = [(column, -size) for column, size in frees.get(k, [])]
            self.row([(before, 1), *gone, (self.runs[t, i], self._written(i)), (now, -1)], 0)
        freed = max(0, -graph.ops[t].workspace_bytes)
        for column, i in zip(live, slots, strict=True):
            more = freed if i < t else 0
            factor = (graph.ops[i].workspace_bytes + more) / self.byte_unit
            self.row([(column, 1), (self.runs[t, i], factor)], (budget_bytes - held + more) / self.byte_unit)

    def _written(self, i: int) -> float:
        return sum(self.size(name) for name in self.graph.ops[i].writes)

    def row(self, terms: Terms, limit: float) -> None:
        """Require `sum of terms <= limit`, constants taken out."""
        pairs: list[tuple[int, float]] = []
        for column, factor in terms:
            if column == _ONE:
                limit -= factor
            elif column is not None:
                pairs.append((column, float(factor)))
        if pairs:
            self.program.row(pairs, limit)
        elif limit < 0:
            raise AssertionError("a row without columns cannot hold")

    def steps(self, values: tuple[float, ...]) -> tuple[int, ...]:
        """The schedule: stage by stage, in captured order."""
        ops = range(len(self.graph.ops))
        return tuple(i for t in ops for i in range(t + 1) if (t, i) in self.runs and (i == t or values[self.runs[t, i]] > 0.5))
