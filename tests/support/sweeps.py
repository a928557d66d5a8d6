"""Plans and sweeps of bare graphs."""

from __future__ import annotations

from typing import Any

from planner.analysis.sweep import sweep_graph
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from planner.solver.solve import Solver


def sweep_of(graph: Graph, *args: Any, **options: Any) -> Sweep:
    """`sweep_graph` as what a user holds."""
    return Sweep.of(sweep_graph(graph, *args, **options))


def plan_of(graph: Graph, share: float = 0.7) -> Plan:
    """A plan of a graph for a share of its plain peak."""
    budget = int(simulate(graph, keep_all(graph)).peak_bytes * share)
    return Plan(graph, budget, 0, Solver(graph).solve(budget, Limits(5.0)))
