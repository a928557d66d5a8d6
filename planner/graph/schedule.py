"""A schedule: which op runs when. Everything else (frees, saved values, overhead) is derived from it."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import ScheduleError
from planner.graph.graph import Graph


@dataclass(frozen=True, slots=True)
class Schedule:
    """Op indices in execution order; an index seen again is a recompute."""

    steps: tuple[int, ...]

    def boundary(self, graph: Graph) -> int:
        """Number of leading steps that make up the forward: up to the last forward op's first run."""
        seen: set[int] = set()
        last = 0
        for t, i in enumerate(self.steps):
            if i < graph.num_forward_ops and i not in seen:
                last = t + 1
            seen.add(i)
        return last

    def recomputes(self) -> tuple[int, ...]:
        """Steps (positions in the schedule) at which an op runs that ran before."""
        seen: set[int] = set()
        again = []
        for t, i in enumerate(self.steps):
            if i in seen:
                again.append(t)
            seen.add(i)
        return tuple(again)


def keep_all(graph: Graph) -> Schedule:
    """The plain step: every op once, in captured order."""
    return Schedule(tuple(range(len(graph.ops))))


def check(graph: Graph, schedule: Schedule) -> None:
    """Raise ScheduleError unless `schedule` is a valid way to run `graph`.

    Valid: every op runs; the forward ops run first, for the first time in captured order (random
    numbers and buffer updates happen in the user's order); a read finds its value written; only
    recomputable ops run again; no backward op runs before the forward is complete.
    """
    ready = set(graph.inputs)
    ran: set[int] = set()
    next_forward = 0
    for t, i in enumerate(schedule.steps):
        if not 0 <= i < len(graph.ops):
            raise ScheduleError(f"step {t} names op {i}; the graph has {len(graph.ops)} ops")
        op = graph.ops[i]
        if i in ran and not op.recomputable:
            raise ScheduleError(f"step {t} runs op {op.name} again, which cannot be recomputed exactly")
        if i < graph.num_forward_ops and i not in ran:
            if i != next_forward:
                raise ScheduleError(f"step {t} runs forward op {op.name} before {graph.ops[next_forward].name}")
            next_forward += 1
        if i >= graph.num_forward_ops and next_forward < graph.num_forward_ops:
            raise ScheduleError(f"step {t} runs backward op {op.name} before forward op {graph.ops[next_forward].name}")
        missing = [name for name in op.reads if name not in ready]
        if missing:
            raise ScheduleError(f"step {t}, op {op.name}, reads {missing[0]} before it is written")
        ready.update(op.writes)
        ran.add(i)
    if len(ran) != len(graph.ops):
        absent = next(i for i in range(len(graph.ops)) if i not in ran)
        raise ScheduleError(f"op {graph.ops[absent].name} never runs")
