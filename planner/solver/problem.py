"""What the stages of the solver work on: a graph, its programs, and a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.solver.baselines import fixed_baselines
from planner.solver.certificate import Certificate
from planner.solver.pieces import Pieces
from planner.solver.tuning import GAP, PIECES


class Models:
    """One graph and its programs, each built when it is first asked for. What they learn from one budget serves the next."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @cached_property
    def certificate(self) -> Certificate:
        """Lower bounds."""
        return Certificate(self.graph)

    @cached_property
    def baselines(self) -> list[tuple[str, Schedule]]:
        """The reference schedules that do not depend on a budget: all but `greedy`."""
        return list(fixed_baselines(self.graph))

    @cached_property
    def pieces(self) -> tuple[Pieces, Pieces]:
        """The graph in pieces, and in half as many."""
        return Pieces(self.graph, PIECES), Pieces(self.graph, PIECES // 2)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One order of the backward, the bytes that a step may take, and how far from the optimum to stop.

    Attributes:
        gap: as a fraction of the plain step's time.
    """

    models: Models
    budget_bytes: int
    gap: float = GAP

    @property
    def precision(self) -> float:
        """How exact programs are solved; where anything that fits will do (a gap of inf), as exact as ever."""
        return min(self.gap, GAP)

    @property
    def graph(self) -> Graph:
        """Forward and backward."""
        return self.models.graph
