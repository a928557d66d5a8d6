"""The core program: which forward values to keep, so that the rest is recomputed at most once.

`planner.solver.copies` writes its rows. Rows for memory are added only where a solution was found to break them; where a
plain row cannot see what recomputation leaves alive, that position of the backward gets an exact copy of the step's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator, Timeline, simulate
from planner.solver import backend
from planner.solver.backend import SCALE
from planner.solver.copies import Copy, Instance, Rows
from planner.solver.lazy import BackwardPosition, backward_positions, lazy_schedule
from planner.solver.tuning import FEW, SLACK
from planner.solver.work import Work

Evaluate = Callable[[Schedule], Timeline]


@dataclass(frozen=True, slots=True)
class Round:
    """One solution of the program.

    Attributes:
        schedule: what it means, within the budget or not; None where the program had no solution.
        is_last: another round would say nothing new.
        grew: only exact copies could express what was wrong, and the program has more of them now.
        fits: the schedule is within the budget; where this is the last round, it is the optimum within the gap.
    """

    schedule: Schedule | None
    is_last: bool
    grew: bool = False
    fits: bool = False


class KeepSet:
    """One graph's program, for any number of budgets; what it learnt from one serves the next."""

    def __init__(
        self, graph: Graph, pinned: Collection[str] = (), *, lowest: bool = False, simulator: Simulator | None = None
    ) -> None:
        """Prepare a graph.

        Args:
            graph: forward and backward.
            pinned: droppable values that are kept for every budget (too small to be worth a decision).
            lowest: minimise the peak instead of the time.
            simulator: the graph's, if it was made before.
        """
        self.data = data = Instance(graph, pinned, lowest=lowest)
        self.graph, self.life = graph, data.life
        self._simulator = simulator or Simulator(graph)
        self._number = {v: data.index[name] for v, name in enumerate(self._simulator.names) if name in data.index}
        first_stage = min((int(s) for s in self.life.first_need), default=graph.num_forward_ops)
        self._plain: dict[int, None] = {first_stage: None} if first_stage < len(graph.ops) else {}  # in order of coming
        self._copies: dict[BackwardPosition, Copy] = {}
        self._write(is_whole=False, less=0)

    def _write(self, *, is_whole: bool, less: int) -> None:
        """Build the program again."""
        self._rows, self._less = Rows(self.data, is_whole=is_whole, less=less), less
        for t in self._plain:
            self._rows.plain(t)
        for position, copy in self._copies.items():
            self._rows.copy(position, copy)

    @property
    def num_copies(self) -> int:
        """Positions of the backward that have an exact copy."""
        return len(self._copies)

    def rounds(
        self, budget_bytes: int | None, work: Work, *, gap: float, evaluate: Evaluate | None = None, relax: bool = False
    ) -> Iterator[Round]:
        """Solve, simulate, add what was broken, and again until the schedule fits.

        Args:
            budget_bytes: bound on the live bytes at every step; None in a program for the lowest peak.
            work: what may be spent.
            gap: absolute, as a fraction of the plain step's time (of its peak where the lowest peak is looked for).
            evaluate: simulates the schedule where it counts (default: on this graph).
            relax: solve linear programs, and round: most of their columns are integer anyway. Proves nothing.
        """
        evaluate = evaluate or (lambda schedule: simulate(self.graph, schedule))
        reached = -math.inf  # the linear optimum of the round before
        if self._less:
            self._write(is_whole=self._rows.is_whole, less=0)
        while True:
            rows = self._rows
            if budget_bytes is not None:
                rows.model.upper(rows.peak, budget_bytes / rows.unit)
            answer = self._solve(work, gap, relax)
            if not answer.values:  # what ran out of work may say more with more of it
                yield Round(None, answer.status != "unknown")
                if answer.status != "unknown":
                    return
                continue
            kept = {name for d, name in enumerate(self.life.names) if answer.values[d] > 0.5}
            schedule = lazy_schedule(self.graph, kept)
            peak = evaluate(schedule).peak_bytes
            limit = budget_bytes or math.ceil(answer.values[rows.peak] * rows.unit + gap * self.data.plain_peak)
            if peak <= limit:
                is_last, grew = answer.status == "optimal", False
            elif relax and answer.bound - reached <= gap * SCALE:
                is_last, grew = True, False  # what is broken now, rounding broke
            else:
                is_last, grew = self._learn(schedule, kept, limit, peak)
            reached = answer.bound
            yield Round(schedule, is_last, grew, peak <= limit)
            if is_last:
                return

    def _learn(self, schedule: Schedule, kept: set[str], limit: int, peak: int) -> tuple[bool, bool]:
        """Add to the program what a schedule broke: (whether nothing was left to add, whether copies were needed)."""
        if self._add_rows(kept, limit):
            return False, False
        if self._add_copies(schedule, limit):
            return False, True
        # Every broken position has its exact copy: what is left is rounding, or bytes that only the original graph shows.
        less = self._less + peak - limit
        if less >= limit * SLACK / 2:
            return True, False
        self._write(is_whole=self._rows.is_whole, less=less)
        return False, False

    def _solve(self, work: Work, gap: float, relax: bool) -> backend.Answer:
        model = self._rows.model
        if relax or len(self._copies) < FEW:  # with more copies, integers take ten times as long as the linear program
            return model.solve(work, gap=gap * SCALE, relax=relax)
        return model.relax_and_fix(work, gap=gap * SCALE)

    def _add_rows(self, kept: set[str], budget_bytes: int) -> bool:
        """Add rows for the ops of the plain step that are over the budget; False where none is."""
        excess_by_op = enumerate(self._plain_excess(kept, budget_bytes))
        over = {t: excess for t, excess in excess_by_op if excess > 0 and t not in self._plain}
        for t in _spaced(over, len(self.graph.ops) // 20):
            self._plain[t] = None
            self._rows.plain(t)
        return bool(over)

    def _add_copies(self, schedule: Schedule, budget_bytes: int) -> bool:
        """Add copies for the positions over the budget; False where nothing new can be said."""
        run = self._simulator.run(schedule.steps)
        live, steps, when = run.live_bytes.tolist(), np.array(schedule.steps), backward_positions(self.graph, schedule)
        forward_end = self.graph.num_forward_ops
        seen: dict[int, Copy] = {}
        for t in (t for t in when if live[t] > budget_bytes):
            later = steps[forward_end : t + 1]
            again = set(later[later < forward_end].tolist())
            held = run.value[(run.start <= t) & (run.end >= t)].tolist()
            alive = {self._number[v] for v in held if v in self._number}
            awaited = set(steps[t + 1 :][steps[t + 1 :] < forward_end].tolist())
            output_copies = {e for i in again for output_copy in self.life.output_copies[i] for e in output_copy.readers}
            again |= {i for i in awaited if i in output_copies or not alive.isdisjoint(self.data.reads[i])}
            seen[t] = Copy(again, alive)
        broken = {t: live[t] - budget_bytes for t, copy in seen.items() if self._grows(when[t], copy)}
        new = {when[t]: seen[t] for t in _spaced(broken, len(live) // 20)}
        is_whole = self._rows.is_whole
        if not new and is_whole:
            # What an op writes may be wanted by ops that a copy does not know of: it may say that it has run, for these.
            ran = set(steps[forward_end:].tolist())
            for position in (when[t] for t in seen):
                known = self._copies[position].again
                beyond = {e for i in known for d in self.data.writes[i] for e in self.life.readers[d] if e in ran} - known
                new |= {position: Copy(beyond, set())} if beyond else {}
            if not new:
                return False
        is_anew = not new or any(position in self._copies for position in new)
        for position, found in new.items():
            copy = self._copies.setdefault(position, Copy(set(), set()))
            copy.again |= found.again
            copy.alive |= found.alive
            if not is_anew:
                self._rows.copy(position, copy)
        if is_anew:
            self._write(is_whole=is_whole or not new, less=self._less)
        return True

    def _grows(self, position: BackwardPosition, seen: Copy) -> bool:
        """The position has no copy, or one that does not know of all that was seen."""
        known = self._copies.get(position)
        return known is None or not (seen.again <= known.again and seen.alive <= known.alive)

    def _plain_excess(self, kept: set[str], budget_bytes: int) -> list[int]:
        """Per op of the plain step, by how much the plain row is broken."""
        life, forward_end = self.life, self.graph.num_forward_ops
        k = np.array([name in kept for name in life.names], dtype=bool)
        change = np.zeros(len(self.graph.ops) + 1, dtype=np.int64)
        lives = k & (np.maximum(life.last_use, forward_end - 1) > life.last_forward)
        np.add.at(change, life.last_forward[lives] + 1, life.nbytes[lives])
        np.add.at(change, np.maximum(life.last_use[lives], forward_end - 1) + 1, -life.nbytes[lives])
        held = life.base + np.cumsum(change[:-1])
        for p in self.graph.backward_ops:
            held[p] += sum(int(life.nbytes[d]) for d in self.data.reads[p] if not (k[d] and life.last_use[d] >= p))
        excess: list[int] = (held - budget_bytes).tolist()
        return excess


def _spaced(over: dict[int, int], distance: int) -> list[int]:
    """The worst few, no two of them close together."""
    chosen: list[int] = []
    for t in sorted(over, key=lambda t: (-over[t], t)):
        if all(abs(t - other) > distance for other in chosen):
            chosen.append(t)
        if len(chosen) == 2 * FEW:
            break
    return chosen
