"""One way to run a unit: what it saves, what it adds while it runs, and what it recomputes."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, check
from planner.graph.simulate import simulate
from planner.graph.unit_frame import Frame


@dataclass(frozen=True, slots=True)
class Point:
    """One way to run a unit, as `simulate` sees it. What the unit is given and what it returns counts where it is made alone.

    Bytes are those of a step in which nobody else needs, once the unit's backward has begun, what the unit was given, its
    outputs and their gradients: each is freed after its last read.

    Attributes:
        schedule: of the unit's own graph.
        saved_bytes: kept from its forward to its backward, its outputs left aside.
        forward_bytes: the most that it adds while its forward runs, outputs included.
        backward_bytes: the most that it adds while its backward runs, saved bytes and gradients included.
        time_ns: of recompute.
        source: what found it.
    """

    schedule: Schedule
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    time_ns: int
    source: str = ""

    @property
    def beyond_bytes(self) -> int:
        """What its backward adds beyond what was saved."""
        return self.backward_bytes - self.saved_bytes

    @property
    def figures(self) -> tuple[int, int, int, int]:
        """What is compared: the less of each, the better."""
        return self.saved_bytes, self.forward_bytes, self.backward_bytes, self.time_ns


def point(graph: Graph, schedule: Schedule, source: str = "", frame: Frame | None = None) -> Point:
    """A schedule of a unit as a point. `frame`: the graph's, if it was made before.

    Raises:
        ScheduleError: the schedule is not a valid way to run the graph.
    """
    check(graph, schedule)  # whose errors name the graph's own ops
    frame = frame or Frame(graph)
    timeline = simulate(frame.graph, frame.schedule(schedule), frame.simulator)
    saved = sum(graph.value[name].nbytes for name in timeline.saved if name not in frame.others)
    forward, backward = timeline.live_bytes[: timeline.boundary - 1], timeline.live_bytes[timeline.boundary :]
    return Point(
        schedule,
        saved,
        max(forward) - frame.given_bytes,
        max(saved, max(backward, default=0) - frame.around_bytes),
        timeline.time_ns - graph.plain_ns,
        source,
    )
