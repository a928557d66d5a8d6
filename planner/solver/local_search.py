"""Local search over schedules: evict what is over the budget, then take back recomputes that are not needed after all.

A schedule is a list of steps and nothing else, so a move is a change of the list: `repair` runs ops again right before
a read, which lets the value go until then; `shrink` deletes such a run, which keeps the value until the read. Any op may run
again any number of times, in the forward too, so this reaches budgets that sets of kept values cannot. It proves nothing; the
certificate does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.simulate import Run, Simulator
from planner.solver.incremental import IncrementalSchedule
from planner.solver.tuning import EVENT_UNITS, FEW, SLACK
from planner.solver.work import Work

Steps = list[int]


class LocalSearch:
    """Changes schedules of one graph so that they fit a budget and take little time."""

    def __init__(self, graph: Graph, budget_bytes: int, simulator: Simulator | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.simulator = simulator or Simulator(graph)
        self.cost = np.array([op.cost_ns for op in graph.ops], dtype=np.int64)
        pinned = graph.pinned
        self.producer = np.array([graph.producer.get(name, -1) for name in self.simulator.names], dtype=np.int64)
        self.droppable = np.array(
            [
                name not in pinned and 0 <= i < graph.num_forward_ops and graph.ops[i].recomputable
                for name, i in zip(self.simulator.names, self.producer.tolist(), strict=True)
            ],
            dtype=bool,
        )

    def time_ns(self, steps: Sequence[int]) -> int:
        """Summed cost of all steps."""
        return int(self.cost[np.asarray(steps, dtype=np.int64)].sum())

    def repair(self, steps: Steps, work: Work, *, spared: int = -1, most_ns: float = float("inf")) -> Steps | None:
        """Evict until the schedule fits; None if nothing helps, nothing is left to spend, or it takes more than `most_ns`.

        `spared`: an op whose values are not evicted.
        """
        run = self.simulator.run(steps)
        self._charge(run, work)
        while int(run.live_bytes.max(initial=0)) > self.budget_bytes:
            if work.is_over:
                return None
            before, now_ns = self._excess(run), self.time_ns(steps)
            best: tuple[float, Steps, Run] | None = None
            for reruns, t in self._evictions(steps, run, spared, work):
                changed, then = self.useful([*steps[:t], *reruns, *steps[t:]])
                self._charge(then, work)
                gain = before - self._excess(then)
                price = (self.time_ns(changed) - now_ns + 1) / gain if gain > 0 else float("inf")
                if gain > 0 and (best is None or price < best[0]):
                    best = (price, changed, then)
            if best is None or self.time_ns(best[1]) > most_ns:
                return None
            _, steps, run = best
        return steps

    def shrink(self, steps: Steps, work: Work) -> Steps:
        """Delete recomputes, the dearest first, as long as the schedule fits without them."""
        schedule = IncrementalSchedule(self.simulator, steps)
        shorter = True
        while shorter:
            shorter = False
            for t in sorted(schedule.again(), key=lambda t: (-self.cost[schedule.steps[t]], -t)):
                if work.is_over:
                    return schedule.done()
                work.charge(EVENT_UNITS * len(schedule.steps) / 16)  # no new simulation
                if schedule.steps[t] >= 0 and schedule.delete(t, self.budget_bytes):
                    shorter = True
        return schedule.done()

    def improve(self, steps: Steps, work: Work) -> Iterator[Steps]:
        """Delete one recompute after the other although the schedule does not fit without it, and evict something else.

        Yields the best schedule so far after every try, and ends when every recompute has been tried without success. A try
        that ran out of work is made again, because there may be more work then.
        """
        steps = self.shrink(steps, work)
        tried: set[tuple[int, int]] = set()
        while True:
            schedule = IncrementalSchedule(self.simulator, steps)
            seen: dict[int, int] = {}
            runs = []
            for t in schedule.again():
                i = steps[t]
                seen[i] = seen.get(i, 0) + 1
                runs.append((-int(self.cost[i]), i, seen[i], t))
            untried = min((run for run in runs if (run[1], run[2]) not in tried), default=None)
            if untried is None:
                return
            _, i, nth, t = untried
            schedule.delete(t)
            now_ns = self.time_ns(steps)
            repaired = self.repair(schedule.done(), work, spared=i, most_ns=1.05 * now_ns)
            if repaired is not None or not work.is_over:
                tried.add((i, nth))
            if repaired is not None:
                repaired = self.shrink(repaired, work)
                if self.time_ns(repaired) < now_ns:
                    steps, tried = repaired, set()
            yield steps

    def squeeze(self, steps: Steps, work: Work) -> Steps:
        """Make it fit a smaller budget, then take back what this one allows: other recomputes may be left, and cheaper ones."""
        for share in np.arange(0.99, 1 - SLACK, -0.01).tolist():
            tighter = copy(self)
            tighter.budget_bytes = int(share * self.budget_bytes)
            repaired = tighter.repair(steps, work)
            shrunk = steps if repaired is None else self.shrink(repaired, work)
            steps = min(steps, shrunk, key=self.time_ns)
        return steps

    def _charge(self, run: Run, work: Work) -> None:
        work.charge(EVENT_UNITS * (300 + len(run.event_step)))

    def _excess(self, run: Run) -> int:
        return int(np.maximum(0, run.live_bytes - self.budget_bytes).sum())

    def useful(self, steps: Steps) -> tuple[Steps, Run]:
        """The schedule without recomputes of which nobody reads a result, and its simulation."""
        while True:
            run = self.simulator.run(steps)
            ops = np.array(steps, dtype=np.int64)
            useless = np.ones(len(ops), dtype=bool)
            useless[np.unique(ops, return_index=True)[1]] = False
            useless[run.start[run.end > run.start]] = False
            if not useless.any():
                return steps, run
            steps = ops[~useless].tolist()

    def _evictions(self, steps: Steps, run: Run, spared: int, work: Work) -> list[tuple[Steps, int]]:
        """The most promising ways to hold less at the peak: ops to run again, and the step before which to do so."""
        peak = int(run.live_bytes.argmax())
        value, step = run.event_value, run.event_step
        across = (value[:-1] == value[1:]) & (step[:-1] < peak) & (step[1:] > peak) & ~run.event_write[1:]
        found = np.flatnonzero(across & self.droppable[value[:-1]] & (self.producer[value[:-1]] != spared))
        excess = np.maximum(0, run.live_bytes - self.budget_bytes)
        near = np.minimum(excess[peak], self.simulator.nbytes[value[found]]) / (1 + self.cost[self.producer[value[found]]])
        spans = _Spans(self, run, len(steps))
        ranked: list[tuple[float, Steps, int]] = []
        for k in found[np.argsort(-near, kind="stable")[: 8 * FEW]].tolist():
            v, last, read = int(value[k]), int(step[k]), int(step[k + 1])
            saved = float(np.minimum(excess[last + 1 : read], self.simulator.nbytes[v]).sum())
            for reruns in self._recompute_sets(int(self.producer[v]), read, spans):
                work.charge(100 * EVENT_UNITS)
                held = sum(self._added(run.live_bytes, *gap) for gap in spans.gaps(reruns, read))
                if saved > held:
                    ranked.append(((int(self.cost[reruns].sum()) + 1) / (saved - held), reruns, read))
        ranked.sort(key=lambda entry: entry[0])
        return [(reruns, read) for _, reruns, read in ranked[: 2 * FEW]]

    def _added(self, live: NDArray[np.int64], v: int, start: int, stop: int) -> float:
        """Excess that holding v from start to stop adds."""
        nbytes = self.simulator.nbytes[v]
        return float(np.clip(live[start:stop] + nbytes - self.budget_bytes, 0, nbytes).sum())

    def _recompute_sets(self, i: int, t: int, spans: _Spans) -> Iterator[Steps]:
        """Ops to run before step t so that op i can run there: inputs that are gone are made, too, 0, 1, 2, 4, ... levels back.

        Inputs of these that are gone, one level farther back, have to be held until t instead.
        """
        reads, reruns, front, depth, yielded = self.simulator.reads, {i}, [i], 0, 0
        while front or len(reruns) > yielded:
            if depth & (depth - 1) == 0 or not front:
                yielded = len(reruns)
                yield sorted(reruns)
            wanted = [v for j in front for v in reads[j] if self.droppable[v] and not spans.alive(v, t, reruns)]
            front = [j for j in dict.fromkeys(int(self.producer[v]) for v in wanted) if j not in reruns]
            reruns.update(front)
            depth += 1


class _Spans:
    """When the values of a schedule are touched, asked for one value at a time."""

    def __init__(self, search: LocalSearch, run: Run, length: int) -> None:
        self._search, self._run, self._length = search, run, length
        self._keys = run.event_value * length + run.event_step

    def alive(self, v: int, t: int, reruns: set[int]) -> bool:
        """The value is alive right before step t anyway (an instance about to be made by `reruns` does not count)."""
        if int(self._search.producer[v]) in reruns:
            return False
        k = self._next(v, t)
        return k < len(self._keys) and int(self._run.event_value[k]) == v and not self._run.event_write[k]

    def gaps(self, reruns: Steps, t: int) -> Iterator[tuple[int, int, int]]:
        """(value, start, stop): inputs of the reruns that it does not make itself, and how much longer they must be held."""
        simulator = self._search.simulator
        made = {v for i in reruns for v in simulator.writes[i]}
        for v in dict.fromkeys(v for i in reruns for v in simulator.reads[i]):
            if v not in made and self._search.droppable[v] and not self.alive(v, t, set()):
                yield v, int(self._run.event_step[self._next(v, t) - 1]) + 1, t

    def _next(self, v: int, t: int) -> int:
        """The first event of v at step t or later."""
        return int(np.searchsorted(self._keys, v * self._length + t))
