"""Every schedule of a graph that was found and not beaten: a plan for a small budget is a plan for a larger one."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline, simulate


@dataclass(frozen=True, slots=True)
class Entry:
    """A schedule, what `simulate` says of it, and who found it."""

    schedule: Schedule
    timeline: Timeline
    solver: str


class Pool:
    """Schedules of one graph, none of which both takes longer and holds more than another."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._entries: list[Entry] = []
        self.offer(keep_all(graph), "keep all")

    def offer(self, schedule: Schedule, solver: str) -> Timeline:
        """Simulate a schedule of the original graph, the only judgement that counts."""
        timeline = simulate(self.graph, schedule)
        if all(e.timeline.peak_bytes > timeline.peak_bytes or e.timeline.time_ns > timeline.time_ns for e in self._entries):
            self._entries = [
                e for e in self._entries if e.timeline.peak_bytes < timeline.peak_bytes or e.timeline.time_ns < timeline.time_ns
            ]
            self._entries.append(Entry(schedule, timeline, solver))
        return timeline

    def cheapest(self, budget_bytes: int) -> Entry | None:
        """The schedule within the budget that takes the least time."""
        fitting = [entry for entry in self._entries if entry.timeline.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda entry: entry.timeline.time_ns, default=None)

    @property
    def lowest(self) -> Entry:
        """The schedule with the lowest peak."""
        return min(self._entries, key=lambda entry: entry.timeline.peak_bytes)

    def near(self, budget_bytes: int, count: int = 3) -> list[Entry]:
        """Schedules a little over the budget, nearest first."""
        over = [entry for entry in self._entries if entry.timeline.peak_bytes > budget_bytes]
        return sorted(over, key=lambda entry: entry.timeline.peak_bytes)[:count]
