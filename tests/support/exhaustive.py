"""Exact search on tiny graphs, a reference: shortest path over the sets of values that are alive.

Written without the programs of the solver and without the simulator: it moves from state to state by
the rules of the language (planner/graph/simulate.py, first sentence of `simulate`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Rules:
    """Which schedules are searched. First runs are always in captured order.

    Attributes:
        times: how often an op may run again; None for any number.
        in_forward: ops may run again before the forward is complete.
        backward_ops: backward ops may run again too.
    """

    times: int | None = None
    in_forward: bool = True
    backward_ops: bool = True


@dataclass(frozen=True, slots=True)
class _State:
    """`done` ops have run for the first time; `alive` can be read; of `copied` outputs the latest instance is a second one."""

    done: int
    alive: frozenset[str]
    copied: frozenset[str]
    again: tuple[tuple[int, int], ...]


def exhaustive(graph: Graph, budget_bytes: int, rules: Rules | None = None) -> Schedule | None:
    """The cheapest schedule within the budget, or None where there is none. Exponential: for up to about 9 ops."""
    search = _Search(graph, budget_bytes, rules or Rules())
    start = _State(0, frozenset(graph.inputs), frozenset(), ())
    best: dict[_State, int] = {start: 0}
    came: dict[_State, tuple[_State, int | None]] = {}
    order = count()
    queue = [(0, next(order), start)]
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        if state.done == len(graph.ops):
            return _path(came, state)
        for step, following in search.moves(state):
            total = cost + (0 if step is None else graph.ops[step].cost_ns)
            if total < best.get(following, total + 1):
                best[following] = total
                came[following] = (state, step)
                heapq.heappush(queue, (total, next(order), following))
    return None


def _path(came: dict[_State, tuple[_State, int | None]], state: _State) -> Schedule:
    steps: list[int] = []
    while state in came:
        state, step = came[state]
        if step is not None:
            steps.append(step)
    return Schedule(tuple(reversed(steps)))


class _Search:
    def __init__(self, graph: Graph, budget_bytes: int, rules: Rules) -> None:
        self.graph, self.budget_bytes, self.rules = graph, budget_bytes, rules
        self.times = len(graph.ops) ** 2 if rules.times is None else rules.times  # more is never of use
        self.nbytes = {value.name: value.nbytes for value in graph.values}
        self.inputs = frozenset(graph.inputs)
        self.last_reader: dict[str, int] = {}  # beyond the end where the reader may run again
        for i, op in enumerate(graph.ops):
            for name in op.reads:
                self.last_reader[name] = max(self.last_reader.get(name, -1), len(graph.ops) if op.recomputable else i)
        self.outputs = frozenset((*graph.forward_outputs, *graph.backward_outputs)) - self.inputs

    def moves(self, state: _State) -> Iterator[tuple[int | None, _State]]:
        """Runs of an op, and, only where memory forbids one, drops of a value (a drop can always wait until then)."""
        blocked = False
        for i in self._runnable(state):
            following = self._after(state, i)
            if following is None:
                blocked = True
            else:
                yield i, following
        if blocked:
            for name in sorted(name for name in state.alive - self.inputs if self._charged(state, name)):
                yield None, _State(state.done, state.alive - {name}, state.copied - {name}, state.again)

    def _charged(self, state: _State, name: str) -> bool:
        """Dropping an output that is the caller's anyway gains nothing."""
        return self.nbytes[name] > 0 and (name not in self.outputs or name in state.copied)

    def _useful(self, done: int, names: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in names if self.last_reader.get(name, -1) >= done)

    def _runnable(self, state: _State) -> Iterator[int]:
        ops, forward_end, rules = self.graph.ops, self.graph.num_forward_ops, self.rules
        often = dict(state.again)
        limit = len(ops) if rules.backward_ops else forward_end
        for i in range(state.done + 1):
            first = i == state.done
            if not first and (not ops[i].recomputable or i >= limit or (not rules.in_forward and state.done < forward_end)):
                continue
            if not first and (state.alive.issuperset(self._useful(state.done, ops[i].writes)) or often.get(i, 0) >= self.times):
                continue
            if state.alive.issuperset(ops[i].reads):
                yield i

    def _after(self, state: _State, i: int) -> _State | None:
        """The state after running op i, or None where it does not fit."""
        op, first, graph = self.graph.ops[i], i == state.done, self.graph
        kept = state.alive - set(op.writes)  # a second run replaces the instances of the first
        written = [name for name in self.outputs if graph.producer[name] < state.done]
        live = graph.resident_bytes + (graph.tangent_bytes if state.done >= graph.num_forward_ops else 0)
        live += sum(self.nbytes[name] for name in written)
        live += sum(self.nbytes[name] for name in kept - self.inputs - self.outputs)
        live += sum(self.nbytes[name] for name in kept & state.copied)
        live += sum(self.nbytes[name] for name in op.writes) + op.workspace_bytes
        if live > self.budget_bytes:
            return None
        alive = self._useful(state.done + first, kept.union(op.writes))
        if first:
            return _State(state.done + 1, alive, state.copied & alive, state.again)
        often = dict(state.again)
        if self.rules.times is not None:  # else how often does not matter, and states stay few
            often[i] = often.get(i, 0) + 1
        copied = (state.copied | self.outputs.intersection(op.writes)) & alive
        return _State(state.done, alive, copied, tuple(sorted(often.items())))
