"""One way to run a unit: what it saves, what it adds while it runs, and what it recomputes."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.graph.simulate import Simulator, simulate


@dataclass(frozen=True, slots=True)
class Point:
    """One way to run a unit, as `simulate` sees it. What the unit is given and what it returns counts where it is made alone.

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


def point(graph: Graph, schedule: Schedule, source: str = "", simulator: Simulator | None = None) -> Point:
    """A schedule of a unit as a point."""
    timeline = simulate(graph, schedule, simulator)
    given = graph.resident_bytes
    outputs = sum(graph.value[name].nbytes for name in dict.fromkeys(graph.forward_outputs))
    saved = sum(graph.value[name].nbytes for name in timeline.saved) - outputs
    forward, backward = timeline.live_bytes[: timeline.boundary], timeline.live_bytes[timeline.boundary :]
    return Point(
        schedule,
        saved,
        max(forward, default=given) - given,
        max(saved, max(backward, default=0) - given - graph.tangent_bytes - outputs),
        timeline.time_ns - graph.plain_ns,
        source,
    )
