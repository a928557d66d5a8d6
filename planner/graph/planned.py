"""A graph with the schedule that was found for a budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.graph.graph import Graph, reserved_name
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.simulate import Timeline, simulate
from planner.graph.solution import Solution

RUN, NOT_RUN = "run", "not run"
"""How `Plan.check` starts."""


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """A graph, a budget and the schedule that fits it: the data of a `Plan`.

    Attributes:
        graph: what was planned, with the costs that were used.
        budget_bytes: bound on everything live on the device during a step.
        margin_bytes: part of the budget the schedule leaves free for the allocator.
        solution: schedule, bound and how it was found.
        provenance: how the graph's costs were found; None where that is not known (a bare graph).
        measured_bytes: measured peak of one planned step, everything resident included; None where none was run.
        check: "run" where one planned step was run, else "not run", with the reason after a colon.
        num_calls: of a unit of a larger step, how often that step calls it; 0: the plan is of a whole step.
    """

    graph: Graph
    budget_bytes: int
    margin_bytes: int
    solution: Solution
    provenance: Provenance | None = None
    measured_bytes: int | None = field(default=None, compare=False)
    check: str = field(default=NOT_RUN, compare=False)
    num_calls: int = field(default=0, compare=False)

    @property
    def timeline(self) -> Timeline:
        """The planned step, simulated."""
        return simulate(self.graph, self.solution.schedule)

    @property
    def is_estimated(self) -> bool:
        """Costs were computed instead of measured: what kernels need for themselves (workspace) is not known."""
        return self.provenance is not None and self.provenance.is_estimated

    @property
    def plain(self) -> Timeline:
        """The step that keeps everything, simulated."""
        return simulate(self.graph, keep_all(self.graph))

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the planned step."""
        return self.timeline.peak_bytes

    @property
    def saved_bytes(self) -> int:
        """Bytes that a forward leaves for its backward."""
        return sum(self.graph.value[name].nbytes for name in self.timeline.saved)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that the other forwards in flight saved: held during the whole step."""
        return 0 if self.graph.in_flight == 1 else (self.graph.in_flight - 1) * self.saved_bytes

    @property
    def free_bytes(self) -> int:
        """What the budget leaves beside the step: what was set aside by `reserve=`, and what the plan does not use."""
        reserved = self.graph.value.get(reserved_name("reserved"))
        free = self.budget_bytes - self.peak_bytes
        return free if reserved is None else free + reserved.nbytes

    @property
    def overhead(self) -> float:
        """Predicted extra time, as a fraction of the plain step."""
        return self.timeline.time_ns / max(1, self.plain.time_ns) - 1

    @property
    def gap(self) -> float:
        """At most this fraction of the plain step could be saved by a better schedule."""
        return max(0, self.timeline.time_ns - self.solution.bound_ns) / max(1, self.plain.time_ns)
