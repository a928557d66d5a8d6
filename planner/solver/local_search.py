"""Local search over schedules: evict what is over the budget, then take back recomputes that are not needed after all.

A schedule is a list of steps and nothing else, so a move is a change of the list: `repair` runs ops again right before
a read, which lets the value go until then; `shrink` deletes such a run, which keeps the value until the read. Any op may run
again any number of times, in the forward too, so this reaches budgets that sets of kept values cannot (formulation,
section 3). It proves nothing; the certificate does.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.graph.graph import Graph
from planner.graph.simulate import Simulator

Steps = list[int]

_DEPTHS = (0, 1, 2, 4, 1000)
"""How far back a recompute goes for inputs that are gone; what is nearer than that and gone is kept until then instead."""
_TRIED = 6
"""Most promising evictions that are simulated before the best of them is made."""


class LocalSearch:
    """Changes schedules of one graph so that they fit a budget and take little time."""

    def __init__(self, graph: Graph, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.simulator = Simulator(graph)
        self.cost = [op.cost_ns for op in graph.ops]
        self.nbytes = self.simulator.nbytes
        self.reads, self.writes = self.simulator.reads, self.simulator.writes
        pinned = graph.pinned
        self.producer = {v: i for i, values in enumerate(self.writes) for v in values}
        self.droppable = [
            name not in pinned and graph.producer[name] < graph.num_forward_ops and graph.ops[graph.producer[name]].recomputable
            for name in self.simulator.names
        ]

    def time_ns(self, steps: Steps) -> int:
        """Summed cost of all steps."""
        return sum(self.cost[i] for i in steps)

    def fits(self, steps: Steps) -> bool:
        """The schedule's peak is within the budget."""
        return max(self.simulator.run(steps)[0], default=0) <= self.budget_bytes

    def repair(self, steps: Steps, deadline: float, *, spared: int = -1, most_ns: float = float("inf")) -> Steps | None:
        """Evict until the schedule fits; None if nothing helps, time is up, or it takes more than `most_ns`.

        `spared`: an op whose values are not evicted.
        """
        live = self._live(steps)
        while live.max() > self.budget_bytes:
            if time.monotonic() >= deadline:
                return None
            before = self._excess(live)
            best: tuple[float, Steps, NDArray[np.int64]] | None = None
            for lane, t in self._evictions(steps, live, spared):
                changed = self._without_useless([*steps[:t], *lane, *steps[t:]])
                then = self._live(changed)
                gain = before - self._excess(then)
                price = (self.time_ns(changed) - self.time_ns(steps) + 1) / gain if gain > 0 else float("inf")
                if gain > 0 and (best is None or price < best[0]):
                    best = (price, changed, then)
            if best is None or self.time_ns(best[1]) > most_ns:
                return None
            _, steps, live = best
        return steps

    def shrink(self, steps: Steps, deadline: float) -> Steps:
        """Delete recomputes, the dearest first, as long as the schedule fits without them."""
        shorter = True
        while shorter:
            shorter = False
            for i, nth in self._removable(steps):
                if time.monotonic() >= deadline:
                    return steps
                changed = self._without(steps, i, nth)
                if changed is not None and self.fits(changed):
                    steps, shorter = changed, True
        return steps

    def _removable(self, steps: Steps) -> list[tuple[int, int]]:
        """Recomputes (op, which of its runs) that may be deleted, the dearest first and of an op the last run first.

        What a recompute makes would be held since it was last there: that must not be over the budget already.
        """
        live, spans, again = self._live(steps), _Spans(self, steps), _again(steps)
        inside = set(again)
        found = []
        runs: dict[int, int] = {}
        for t in again:
            i = steps[t]
            runs[i] = runs.get(i, 0) + 1
            refund = sum(self.nbytes[v] for v in self.reads[i])  # at most: inputs need not be there for it
            lane = t
            while lane - 1 in inside:
                lane -= 1  # what only serves this recompute goes with it
            held = [(v, last) for v in self.writes[i] if (last := spans.last_before(v, t)) is not None]
            if all(live[last + 1 : lane].max(initial=0) + self.nbytes[v] - refund <= self.budget_bytes for v, last in held):
                found.append((i, runs[i]))
        return sorted(found, key=lambda run: (-self.cost[run[0]], run[0], -run[1]))

    def improve(self, steps: Steps, deadline: float, enough_ns: float = 0) -> Steps:
        """Delete one recompute after the other although the schedule does not fit without it, and evict something else.

        Stops when every recompute has been tried in vain, at the deadline, or at `enough_ns`.
        """
        steps = self.shrink(steps, deadline)
        tried: set[tuple[int, int]] = set()
        while self.time_ns(steps) > enough_ns and time.monotonic() < deadline:
            runs = {(i, nth) for i in {steps[t] for t in _again(steps)} for nth in range(1, steps.count(i))}
            untried = sorted(runs - tried, key=lambda run: (-self.cost[run[0]], run))
            if not untried:
                break
            tried.add(untried[0])
            trial = self._without(steps, *untried[0])
            now_ns = self.time_ns(steps)
            repaired = None if trial is None else self.repair(trial, deadline, spared=untried[0][0], most_ns=1.05 * now_ns)
            if repaired is not None:
                repaired = self.shrink(repaired, deadline)
                if self.time_ns(repaired) < now_ns:
                    steps, tried = repaired, set()
        return steps

    def _live(self, steps: Steps) -> NDArray[np.int64]:
        return np.array(self.simulator.run(steps)[0], dtype=np.int64)

    def _excess(self, live: NDArray[np.int64]) -> int:
        return int(np.maximum(0, live - self.budget_bytes).sum())

    def _without(self, steps: Steps, i: int, nth: int) -> Steps | None:
        """The schedule without the nth run (from 0) of op i, and without what then nobody reads; None: there is none."""
        runs = [t for t, j in enumerate(steps) if j == i]
        return self._without_useless([*steps[: runs[nth]], *steps[runs[nth] + 1 :]]) if nth < len(runs) else None

    def _without_useless(self, steps: Steps) -> Steps:
        """The schedule without recomputes of which nobody reads a result."""
        again = set(_again(steps))
        wanted: set[int] = set()
        kept: Steps = []
        for t in range(len(steps) - 1, -1, -1):
            i = steps[t]
            if t in again and wanted.isdisjoint(self.writes[i]):
                continue
            wanted.difference_update(self.writes[i])
            wanted.update(self.reads[i])
            kept.append(i)
        kept.reverse()
        return kept

    def _evictions(self, steps: Steps, live: NDArray[np.int64], spared: int) -> list[tuple[Steps, int]]:
        """The most promising ways to hold less at the peak: ops to run again, and the step before which to do so."""
        peak = int(live.argmax())
        touched = {*self.reads[steps[peak]], *self.writes[steps[peak]]}
        spans = _Spans(self, steps)
        excess = np.maximum(0, live - self.budget_bytes)
        ranked: list[tuple[float, Steps, int]] = []
        for v, last, read in spans.across(peak):
            if v in touched or self.producer[v] == spared:
                continue
            saved = float(np.minimum(excess[last + 1 : read], self.nbytes[v]).sum())
            for lane in self._lanes(self.producer[v], read, spans):
                held = sum(self._added(live, *gap) for gap in spans.gaps(lane, read))
                if saved > held:
                    ranked.append(((sum(self.cost[i] for i in lane) + 1) / (saved - held), lane, read))
        ranked.sort(key=lambda entry: entry[0])
        return [(lane, read) for _, lane, read in ranked[:_TRIED]]

    def _added(self, live: NDArray[np.int64], v: int, start: int, stop: int) -> float:
        """Excess that holding v from start to stop adds."""
        return float(np.clip(live[start:stop] + self.nbytes[v] - self.budget_bytes, 0, self.nbytes[v]).sum())

    def _lanes(self, i: int, t: int, spans: _Spans) -> Iterator[Steps]:
        """Ops to run before step t so that op i can run there, fewest first."""
        seen: set[tuple[int, ...]] = set()
        for depth in _DEPTHS:
            lane = {i}
            front = [i]
            for _ in range(depth):
                front = [
                    self.producer[v] for j in front for v in self.reads[j] if self.droppable[v] and not spans.alive(v, t, lane)
                ]
                front = [j for j in dict.fromkeys(front) if j not in lane]
                if not front:
                    break
                lane.update(front)
            if tuple(sorted(lane)) in seen:
                break
            seen.add(tuple(sorted(lane)))
            yield sorted(lane)


def _again(steps: Sequence[int]) -> list[int]:
    """Steps at which an op runs that ran before."""
    seen: set[int] = set()
    return [t for t, i in enumerate(steps) if i in seen or seen.add(i)]  # type: ignore[func-returns-value]


class _Spans:
    """When the droppable values of a schedule are touched."""

    def __init__(self, search: LocalSearch, steps: Steps) -> None:
        self._search = search
        self._touches: dict[int, list[int]] = {}
        self._written: dict[int, set[int]] = {}
        for t, i in enumerate(steps):
            for v in search.reads[i]:
                if search.droppable[v]:
                    self._touches[v].append(t)
            for v in search.writes[i]:
                if search.droppable[v]:
                    self._touches.setdefault(v, []).append(t)
                    self._written.setdefault(v, set()).add(t)

    def across(self, t: int) -> Iterator[tuple[int, int, int]]:
        """(value, last touch before t, next read after t) of the droppable values that are alive at t for that read."""
        for v, touches in self._touches.items():
            k = bisect_left(touches, t)
            if 0 < k < len(touches) and touches[k] not in self._written[v]:
                yield v, touches[k - 1], touches[k]

    def last_before(self, v: int, t: int) -> int | None:
        """The last touch before the instance that step t makes, if anybody reads that instance."""
        touches = self._touches.get(v, [])
        k = bisect_left(touches, t)
        read = k + 1 < len(touches) and touches[k + 1] not in self._written[v]
        return touches[k - 1] if k and read else None

    def alive(self, v: int, t: int, lane: set[int]) -> bool:
        """The value is alive right before step t anyway (an instance about to be made by `lane` does not count)."""
        touches = self._touches[v]
        k = bisect_left(touches, t)
        return self._search.producer[v] not in lane and k < len(touches) and touches[k] not in self._written[v]

    def gaps(self, lane: Steps, t: int) -> Iterator[tuple[int, int, int]]:
        """(value, start, stop): inputs of the lane that it does not make itself, and how much longer they must be held."""
        made = {v for i in lane for v in self._search.writes[i]}
        for v in dict.fromkeys(v for i in lane for v in self._search.reads[i]):
            if v in made or not self._search.droppable[v] or self.alive(v, t, set()):
                continue
            touches = self._touches[v]
            yield v, touches[bisect_left(touches, t) - 1] + 1, t
