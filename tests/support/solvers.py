"""What tests of the solver share."""

from __future__ import annotations

import math

import pulp
import pytest

from planner.graph.graph import Graph
from planner.graph.simulate import simulate
from planner.solver import backend
from tests.support.exhaustive import exhaustive


def without_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HiGHS were not installed."""
    backend.require_highs.cache_clear()
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)


def optimum(graph: Graph, budget_bytes: int) -> float:
    """Over every valid schedule in the captured order of first runs."""
    best = exhaustive(graph, budget_bytes)
    return math.inf if best is None else simulate(graph, best).time_ns
