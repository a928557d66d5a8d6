"""Neighbourhood search: parts of a schedule are decided anew, in integers, with recomputes offered all over them.

Every first run stays where it is. In a few stretches of the schedule every recompute is a choice, and before every first
run there those ops are offered that make what it reads, a few levels back; elsewhere recomputes stay. Values may be let go
and made again between any two touches . Few choices keep the program small, while memory counts
over the whole step: what one stretch gives up, another may spend.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from planner.graph.graph import Graph
from planner.graph.simulate import Run
from planner.solver import backend
from planner.solver.local_search import LocalSearch, Steps
from planner.solver.tuning import WINDOW_UNITS
from planner.solver.work import Work

_SCALE = 1e4
_FEWEST, _MOST = 40, 600
"""Choices in one program."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place where an op runs, or may run: `at` is the step of the schedule at hand that it is, or comes right before."""

    op: int
    at: int
    fixed: bool


class Neighbourhood:
    """Improves a schedule of one graph that fits a budget."""

    def __init__(self, graph: Graph, budget_bytes: int, *, depth: int = 2, seed: int = 0) -> None:
        self.search = LocalSearch(graph, budget_bytes)
        self.simulator = self.search.simulator
        self.budget_bytes, self._depths = budget_bytes, (depth, depth, 1, 2 * depth)
        self._chance = random.Random(seed)
        self._target, self._useless = 4 * _FEWEST, 0
        self._recomputable = [op.recomputable and i < graph.num_forward_ops for i, op in enumerate(graph.ops)]

    @property
    def is_settled(self) -> bool:
        """Programs that left every recompute open had nothing better."""
        return self._useless >= len(self._depths)

    def improve(self, steps: Steps, work: Work) -> Steps | None:
        """Open stretches by chance, more or less of them by how much work the programs take; a better schedule, or None."""
        slots, everything = self._slots(steps, self._target)
        before = work.meter.spent
        better, settled = self._solve(steps, slots, work.share(WINDOW_UNITS))
        self._useless += everything and settled and better is None
        fast = work.meter.spent - before < WINDOW_UNITS / 4
        self._target = min(_MOST, self._target * 5 // 4) if fast else max(_FEWEST, self._target * 2 // 3)
        return None if better is None else self.search.shrink(better, work)

    def _slots(self, steps: Steps, target: int) -> tuple[list[Slot], bool]:
        """All slots, about `target` of them open, in one to three stretches; and whether nothing was left fixed."""
        firsts = np.zeros(len(steps), dtype=bool)
        firsts[np.unique(np.array(steps), return_index=True)[1]] = True
        lanes: dict[int, list[int]] = {}
        lane: set[int] = set()
        ran: set[int] = set()
        depth = self._chance.choice(self._depths)
        for t, i in enumerate(steps):
            if firsts[t]:
                lanes[t] = sorted(lane | self._makers(i, ran, depth))
                lane = set()
                ran.add(i)
            else:
                lane.add(i)
        opened = self._opened(list(lanes), {t: len(lane) for t, lane in lanes.items()}, target)
        slots: list[Slot] = []
        for t, i in enumerate(steps):
            if firsts[t]:
                slots += [Slot(j, t, False) for j in lanes[t]] if t in opened else []
                slots.append(Slot(i, t, True))
            elif next(p for p in range(t, len(steps)) if firsts[p]) not in opened:
                slots.append(Slot(i, t, True))
        return slots, len(opened) == len(lanes)

    def _opened(self, places: list[int], choices: dict[int, int], target: int) -> set[int]:
        """The first runs before which recomputes are open."""
        if sum(choices.values()) <= target:
            return set(places)
        opened: set[int] = set()
        pieces = self._chance.choice((1, 2, 2, 3))
        for _ in range(pieces):
            n, count = self._chance.randrange(len(places)), 0
            while n < len(places) and count < target // pieces:
                opened.add(places[n])
                count += choices[places[n]]
                n += 1
        return opened

    def _makers(self, op: int, ran: set[int], depth: int) -> set[int]:
        """Ops that make what an op reads, so many levels back, and that may run again."""
        found: set[int] = set()
        front = [op]
        for _ in range(depth):
            makers = {int(self.search.producer[v]) for i in front for v in self.simulator.reads[i] if self.search.droppable[v]}
            front = [i for i in makers - found if i in ran and self._recomputable[i]]
            found.update(front)
        return found

    def _solve(self, steps: Steps, slots: list[Slot], work: Work) -> tuple[Steps | None, bool]:
        """A better schedule or None, and whether the same program would have nothing better to say another time."""
        time_ns = self.search.time_ns(steps)
        spent_ns = time_ns - sum(int(self.search.cost[s.op]) for s in slots if s.fixed)
        if spent_ns <= 0:
            return None, True
        program = _Program(self, self.simulator.run(steps), slots, spent_ns)
        answer = backend.solve(program.program, work, gap=_SCALE * 1e-3)
        if not answer.values:
            return None, answer.status == "infeasible"
        chosen = [s.op for s, column in zip(slots, program.runs, strict=True) if column is None or answer.values[column] > 0.5]
        changed, after = self.search.useful(chosen)
        fits = int(after.live_bytes.max()) <= self.budget_bytes
        better = fits and self.search.time_ns(changed) < time_ns
        return (changed, False) if better else (None, True)


class _Program:
    """The program of one neighbourhood. `runs`: per slot the column that says whether it runs; None where it must."""

    def __init__(self, owner: Neighbourhood, run: Run, slots: list[Slot], spent_ns: int) -> None:
        self.program = backend.Program()
        self._simulator, self._slots = owner.simulator, slots
        self._unit = owner.budget_bytes / _SCALE
        cost = owner.search.cost
        self.runs = [
            None if s.fixed else self.program.column(float(cost[s.op] + 0.5) * _SCALE / spent_ns, binary=True) for s in slots
        ]
        offered = [(c, float(cost[s.op]) / spent_ns) for s, c in zip(slots, self.runs, strict=True) if c is not None]
        self.program.row(offered, 1 - 0.5 / spent_ns)  # better than now
        touched = {v for s in slots if not s.fixed for v in (*self._simulator.reads[s.op], *self._simulator.writes[s.op])}
        self._values = sorted(v for v in touched if not self._simulator.outputs[v])
        # Per slot, values and the column that holds them from there on.
        self._changes: list[list[tuple[int, int]]] = [[] for _ in slots]
        touches: dict[int, list[tuple[int, bool]]] = {v: [] for v in self._values}
        for n, slot in enumerate(slots):
            for v in self._simulator.reads[slot.op]:
                if v in touches:
                    touches[v].append((n, False))
            for v in self._simulator.writes[slot.op]:
                if v in touches:
                    touches[v].append((n, True))
        for v in self._values:
            self._value(v, touches[v])
        self._memory(run, owner.budget_bytes)

    def _value(self, v: int, touches: list[tuple[int, bool]]) -> None:
        """Retention of one value from touch to touch; a float stands for a constant, an int for a column."""
        program = self.program
        alive: int | float = 0.0
        for n, writes in touches:
            runs, after = self.runs[n], program.column()
            if writes:
                # Made here, or alive before and kept; made for nothing, it still takes its room while it is made.
                room = after
                if runs is None:
                    program.row([(room, -1.0)], -1.0)
                else:
                    self._at_most(after, [alive, runs])
                    if len(self._simulator.writes[self._slots[n].op]) > 1:
                        room = program.column()
                        program.row([(after, 1.0), (room, -1.0)], 0.0)
                    program.row([(runs, 1.0), (room, -1.0)], 0.0)
                self._changes[n].append((v, room))
            else:
                self._at_most(after, [alive])
                self._at_most(1.0 if runs is None else runs, [alive])
            if n + 1 < len(self._slots):
                self._changes[n + 1].append((v, after))
            alive = after

    def _at_most(self, what: int | float, total: list[int | float]) -> None:
        """what <= sum of total."""
        limit = sum(x for x in total if isinstance(x, float)) - (what if isinstance(what, float) else 0.0)
        pairs = [(x, -1.0) for x in total if isinstance(x, int)]
        self.program.row([*([(what, 1.0)] if isinstance(what, int) else []), *pairs], limit)

    def _memory(self, run: Run, budget_bytes: int) -> None:
        """Where it could be too much: what is alive whatever is chosen, and what is held by choice.

        Slots in a row between which nothing chosen changes share one memory row, that of the fullest.
        """
        nbytes, nothing = self._simulator.nbytes, len(self._slots)
        held: dict[int, int] = {}
        full: tuple[int, backend.Pairs] | None = None
        fixed = self._fixed(run)
        for n in range(nothing):
            if self._changes[n] and full is not None:
                self._row(held, full, budget_bytes)
                full = None
            held.update(self._changes[n])
            own: backend.Pairs = []
            column = self.runs[n]
            if column is not None:
                copies = sum(int(nbytes[v]) for v in self._simulator.writes[self._slots[n].op] if self._simulator.outputs[v])
                own = [(column, float(copies + int(self._simulator.workspace[self._slots[n].op])))]
            if full is None or fixed[n] + sum(x for _, x in own) > full[0] + sum(x for _, x in full[1]):
                full = (fixed[n], own)
        if full is not None:
            self._row(held, full, budget_bytes)

    def _row(self, held: dict[int, int], full: tuple[int, backend.Pairs], budget_bytes: int) -> None:
        fixed, own = full
        pairs = [(c, float(self._simulator.nbytes[v])) for v, c in held.items()] + own
        if fixed + sum(size for _, size in pairs) > budget_bytes:
            self.program.row([(c, size / self._unit) for c, size in pairs], (budget_bytes - fixed) / self._unit)

    def _fixed(self, run: Run) -> list[int]:
        """Per slot, bytes that no choice changes."""
        simulator = self._simulator
        mine = np.zeros(len(simulator.names), dtype=bool)
        mine[self._values] = True
        chosen = mine[run.value]
        change = np.zeros(len(run.live_bytes) + 2, dtype=np.int64)
        np.add.at(change, run.start[chosen], simulator.nbytes[run.value[chosen]])
        np.subtract.at(change, np.minimum(run.end[chosen], len(run.live_bytes)) + 1, simulator.nbytes[run.value[chosen]])
        rest = run.live_bytes - np.cumsum(change)[: len(run.live_bytes)]
        fixed: list[int] = []
        following = 0
        for slot in reversed(self._slots):
            if slot.fixed:
                own = int(simulator.workspace[slot.op]) + sum(
                    int(simulator.nbytes[v]) for v in simulator.writes[slot.op] if not mine[v]
                )
                following = int(rest[slot.at]) - own
                fixed.append(int(rest[slot.at]))
            else:
                fixed.append(following)
        return fixed[::-1]
