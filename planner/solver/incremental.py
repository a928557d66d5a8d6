"""A schedule from which recomputes are deleted one by one; the live bytes follow without a new simulation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from planner.graph.simulate import Simulator

Event = tuple[int, bool]
"""A step, and whether it writes the value (else it reads it)."""


class IncrementalSchedule:
    """A schedule under change. A deleted step leaves a hole, so that no other step moves.

    Attributes:
        steps: op indices, -1 where a step was deleted.
        live_bytes: per step, as `simulate` counts them; what stands in a hole means nothing.
        kept: per step, whether it is no hole.
    """

    def __init__(self, simulator: Simulator, steps: Sequence[int]) -> None:
        self.steps = list(steps)
        self._simulator = simulator
        self._run = simulator.run(steps)
        self.live_bytes = self._run.live_bytes.copy()
        self.kept = np.ones(len(self.steps), dtype=bool)
        self._boundary = self.steps.index(simulator.last_forward) + 1 if simulator.last_forward >= 0 else 0
        self._offset = np.searchsorted(self._run.event_value, np.arange(len(simulator.names) + 1))
        self._events: dict[int, list[Event]] = {}
        seen: set[int] = set()
        self._again = {t for t, i in enumerate(self.steps) if i in seen or seen.add(i)}  # type: ignore[func-returns-value]

    def again(self) -> list[int]:
        """Steps at which an op runs that ran before."""
        return sorted(self._again)

    def done(self) -> list[int]:
        """The schedule as it is now."""
        return [i for i in self.steps if i >= 0]

    def delete(self, t: int, budget_bytes: int | None = None) -> bool:
        """Delete the recompute at step t, and every recompute that served nothing else.

        With a budget only if no step holds more afterwards; the answer is whether it was done.
        """
        changed: dict[int, list[Event]] = {}
        holes = self._unravel(t, changed)
        live, kept = self.live_bytes.copy(), self.kept.copy()
        kept[list(holes)] = False
        for v, events in changed.items():
            self._hold(live, v, self._touches(v), -1)
            self._hold(live, v, events, +1)
        if budget_bytes is not None and int(live[kept].max()) > budget_bytes:
            return False
        self.live_bytes, self.kept = live, kept
        self._events.update(changed)
        self._again.difference_update(holes)
        for hole in holes:
            self.steps[hole] = -1
        return True

    def _unravel(self, t: int, changed: dict[int, list[Event]]) -> set[int]:
        """The steps to delete with step t; fills in the events that are left of every value they touch."""
        holes: set[int] = set()
        stack = [t]
        while stack:
            t = stack.pop()
            if t in holes:
                continue
            holes.add(t)
            i = self.steps[t]
            for v in self._simulator.writes[i]:
                changed[v] = [event for event in changed.get(v, self._touches(v)) if event != (t, True)]
            for v in self._simulator.reads[i]:
                changed[v] = [event for event in changed.get(v, self._touches(v)) if event != (t, False)]
                made = max((s for s, write in changed[v] if write and s < t), default=-1)
                siblings = self._simulator.writes[self.steps[made]] if made in self._again else ()
                if siblings and not any(self._read(w, made, changed) for w in siblings):
                    stack.append(made)
        return holes

    def _read(self, v: int, made: int, changed: dict[int, list[Event]]) -> bool:
        """Somebody reads the instance of v that step `made` writes."""
        events = changed.get(v, self._touches(v))
        following = events.index((made, True)) + 1
        return following < len(events) and not events[following][1]

    def _touches(self, v: int) -> list[Event]:
        if v not in self._events:
            low, high = self._offset[v], self._offset[v + 1]
            steps, writes = self._run.event_step[low:high].tolist(), self._run.event_write[low:high].tolist()
            self._events[v] = list(zip(steps, writes, strict=True))
        return self._events[v]

    def _hold(self, live: np.typing.NDArray[np.int64], v: int, events: list[Event], sign: int) -> None:
        """Add (or take away) the bytes of every instance of v; those that are saved, for other forwards in flight too."""
        nbytes = sign * int(self._simulator.nbytes[v])
        begins = [k for k, (_, write) in enumerate(events) if write]
        for k, following in pairwise([*begins, len(events)]):
            forever = k == begins[0] and self._simulator.outputs[v]
            start, stop = events[k][0], len(live) if forever else events[following - 1][0] + 1
            live[start:stop] += nbytes
            if start < self._boundary < stop:
                live += self._simulator.others * nbytes
