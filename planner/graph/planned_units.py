"""A step whose units were planned one by one: kinds of units with their schedules, and the outer code around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from planner.graph.accumulation import HELD
from planner.graph.compose import Composed, compose
from planner.graph.graph import Graph
from planner.graph.outer import OuterGraph
from planner.graph.planned import NOT_RUN, RUN, PlannedGraph
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.graph.unit_frame import Frame
from planner.graph.unit_point import Point, point


@dataclass(frozen=True)
class PlannedKind:
    """Units that run the same kernels.

    Attributes:
        name: their class.
        graph: of one of them.
        schedules: the ways in which they run.
        provenance: how the graph's costs were found.
    """

    name: str
    graph: Graph
    schedules: tuple[Schedule, ...]
    provenance: Provenance | None = None

    @cached_property
    def frame(self) -> Frame:
        """The graph as it runs in a step."""
        return Frame(self.graph)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """What each schedule saves, needs and recomputes."""
        return tuple(point(self.graph, schedule, frame=self.frame) for schedule in self.schedules)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """The peak of each schedule, of the graph alone."""
        return tuple(simulate(self.graph, schedule).peak_bytes for schedule in self.schedules)


@dataclass(frozen=True)
class PlannedUnitGraphs:
    """What a UnitPlan holds.

    Attributes:
        kinds: of units.
        units: per unit, by qualified name: the positions of its kind and of its schedule.
        outer: the step around the units.
        budget_bytes: bound on everything live on the device during a step.
        plain_bytes: measured peak of the plain step; None where it did not fit, or none was run.
        measured_bytes: measured peak of the planned step, everything resident included; None where none was run.
        bound_ns: no choice of the points that were found within the budget recomputes less.
        left: submodules that run as they are, and why.
    """

    kinds: tuple[PlannedKind, ...]
    units: Mapping[str, tuple[int, int]]
    outer: OuterGraph
    budget_bytes: int
    plain_bytes: int | None = None
    measured_bytes: int | None = None
    bound_ns: int = 0
    left: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def composed(self) -> Composed:
        """Outer code and units as one graph."""
        return compose(self.outer, {unit: self.kinds[kind].graph for unit, (kind, _) in self.units.items()})

    @cached_property
    def planned(self) -> PlannedGraph:
        """The whole step as one planned graph, in which recompute is confined to units."""
        graph = self.composed.graph
        schedule = self.composed.schedule({unit: self.kinds[kind].schedules[at] for unit, (kind, at) in self.units.items()})
        bound_ns = graph.plain_ns + self.bound_ns
        status = "optimal" if self.recompute_ns <= self.bound_ns else "feasible"
        check = NOT_RUN if self.measured_bytes is None else RUN
        solution = Solution(status, schedule, bound_ns, 0.0, "units")
        return PlannedGraph(graph, self.budget_bytes, 0, solution, self.provenance, self.measured_bytes, check)

    @cached_property
    def spare_bytes(self) -> Mapping[str, int]:
        """Per unit, what the budget leaves above its own peak, of its graph alone, while it runs; the least of its calls.

        In the step the unit takes as much more than alone as is live beside it where its forward, or its backward, begins. It
        may take less: alone, it frees nothing of what it is given.
        """
        planned = self.planned
        at = {op: i for i, op in enumerate(planned.solution.schedule.steps)}
        unforeseen = max(0, (self.measured_bytes or 0) - self.peak_bytes)
        found: dict[str, int] = {}
        for call, (enter, _, enter_again, _) in self.composed.bounds.items():
            kind, number = self.units[call.unit]
            own, saved_bytes = self.kinds[kind], self.kinds[kind].points[number].saved_bytes
            forward = planned.timeline.live_bytes[at[enter]] - own.frame.given_bytes
            backward = planned.timeline.live_bytes[at[enter_again]] - saved_bytes - own.frame.around_bytes
            spare = max(0, self.budget_bytes - unforeseen - max(forward, backward) - own.peaks[number])
            found[call.unit] = min(spare, found.get(call.unit, spare))
        return found

    @property
    def accumulates(self) -> bool:
        """Gradients of earlier micro-steps are counted."""
        return HELD in self.outer.graph.value

    @property
    def provenance(self) -> Provenance | None:
        """How the costs were found."""
        return self.kinds[0].provenance if self.kinds else None

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the planned step."""
        return self.planned.peak_bytes

    @property
    def recompute_ns(self) -> int:
        """Predicted time of all recomputes."""
        treated = (self.units[call.unit] for call in self.outer.calls)
        return sum(self.kinds[kind].points[at].time_ns for kind, at in treated)

    @property
    def plain_ns(self) -> int:
        """Predicted time of the plain step; of the units alone where the outer code was measured."""
        return self.composed.graph.plain_ns

    @property
    def overhead(self) -> float:
        """Predicted extra time, as a fraction of `plain_ns`."""
        return self.recompute_ns / max(1, self.plain_ns)

    @property
    def gap(self) -> float:
        """At most this fraction of `plain_ns` could be saved by another choice of the points that were found."""
        return max(0, self.recompute_ns - self.bound_ns) / max(1, self.plain_ns)
