"""Sweeps of bare graphs."""

from __future__ import annotations

from typing import Any

from planner.analysis.sweep import sweep_graph
from planner.graph.graph import Graph
from planner.results.sweep import Sweep


def sweep_of(graph: Graph, *args: Any, **options: Any) -> Sweep:
    """`sweep_graph` as what a user holds."""
    return Sweep.of(sweep_graph(graph, *args, **options))
