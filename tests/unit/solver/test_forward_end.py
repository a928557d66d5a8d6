"""Several forwards in flight: what simulate counts, and plans with their bounds against every kind of schedule."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from planner.errors import GraphError, InfeasibleBudgetError
from planner.graph.floor import floor
from planner.graph.graph import RESIDENT_KINDS, Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.forward_end import with_forward_end, without_forward_end
from planner.solver.solve import Solver, lowest_peak, solve
from tests.support import graphs
from tests.support.solvers import optimum
from tests.support.strategies import scatter, schedules, training_graphs

IN_FLIGHT = st.integers(2, 5)


@settings(deadline=None, max_examples=60)
@given(st.data(), IN_FLIGHT)
def test_the_others_hold_what_each_forward_saves(data: st.DataObject, count: int) -> None:
    graph = data.draw(training_graphs())
    schedule = data.draw(schedules(graph))
    alone, several = (simulate(replace(graph, in_flight=n), schedule) for n in (1, count))
    saved = sum(graph.value[name].nbytes for name in alone.saved)
    assert several.live_bytes == tuple(nbytes + (count - 1) * saved for nbytes in alone.live_bytes)
    assert several.saved == alone.saved and several.time_ns == alone.time_ns
    assert floor(replace(graph, in_flight=count))[0] <= several.peak_bytes


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 30))
def test_the_workspace_bounds_what_is_saved(data: st.DataObject, workspace: int) -> None:
    graph = data.draw(training_graphs())
    bounded = with_forward_end(graph, workspace)
    schedule = data.draw(schedules(bounded))
    found = simulate(bounded, schedule)
    alone = simulate(graph, without_forward_end(schedule, graph))
    saved = sum(graph.value[name].nbytes for name in alone.saved)
    resident = sum(value.nbytes for value in graph.values if value.kind in RESIDENT_KINDS) - graph.tangent_bytes
    assert found.peak_bytes == max(alone.peak_bytes, resident + saved + workspace)
    assert found.time_ns == alone.time_ns


def optimum_in_flight(graph: Graph, budget_bytes: int) -> float:
    """Over all schedules with p + (n - 1) s within the budget: for each s, those that save no more and peak at no more."""
    alone, best = replace(graph, in_flight=1), math.inf
    for saved in range(budget_bytes - graph.resident_bytes + 1):
        peak = budget_bytes - (graph.in_flight - 1) * saved
        workspace = peak - graph.resident_bytes - saved
        if workspace >= 0:
            best = min(best, optimum(with_forward_end(alone, workspace), peak))
    return best


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(2, 3))
def test_no_schedule_at_all_beats_the_bound(data: st.DataObject, count: int) -> None:
    graph = replace(data.draw(training_graphs(max_forward=3)), in_flight=count)
    plain, least = simulate(graph, keep_all(graph)).peak_bytes, floor(graph)[0]
    budget = least + (plain - least) * data.draw(st.integers(0, 9)) // 10
    best, outcome = optimum_in_flight(graph, budget), Solver(graph, reorder=False).sweep([budget], gap=1e-6)[budget]
    event(f"recompute: {graph.plain_ns < best < math.inf}, {type(outcome).__name__}")
    if isinstance(outcome, Solution):
        found = simulate(graph, outcome.schedule).time_ns
        assert outcome.bound_ns <= best <= found
        event(f"optimal: {found == best}")


@settings(deadline=None, max_examples=20)
@given(st.data(), IN_FLIGHT)
def test_plans_fit_and_no_schedule_that_fits_beats_their_bound(data: st.DataObject, count: int) -> None:
    graph = replace(data.draw(training_graphs(max_forward=4)), in_flight=count)
    plain = simulate(graph, keep_all(graph)).peak_bytes
    least = floor(graph)[0]
    budget = least + (plain - least) * data.draw(st.integers(0, 10)) // 10
    outcome = Solver(graph).sweep([budget], Limits(1.0))[budget]
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    others = [simulate(graph, scatter(graph, rng, keep=keep)) for keep in (0.1, 0.3, 0.5, 0.7, 0.9) for _ in range(8)]
    fitting = [other.time_ns for other in others if other.peak_bytes <= budget]
    if isinstance(outcome, Solution):
        timeline = simulate(graph, outcome.schedule)
        assert timeline.peak_bytes <= budget
        assert outcome.bound_ns <= min([timeline.time_ns, *fitting])
    event(f"{type(outcome).__name__}, {'some' if fitting else 'none'} of the random schedules fit")
    assert isinstance(outcome, Solution) or not isinstance(outcome, InfeasibleBudgetError) or not fitting


def test_a_chain_of_blocks_is_planned_to_its_optimum() -> None:
    graph = replace(graphs.blocks(8), in_flight=4)
    plain = simulate(graph, keep_all(graph))
    solution = solve(graph, plain.peak_bytes * 6 // 10, Limits(6.0))
    timeline = simulate(graph, solution.schedule)
    assert timeline.peak_bytes <= plain.peak_bytes * 6 // 10
    assert timeline.time_ns - solution.bound_ns <= 0.001 * plain.time_ns
    alone = simulate(replace(graph, in_flight=1), solution.schedule)
    assert alone.peak_bytes < timeline.peak_bytes


@settings(deadline=None, max_examples=8)
@given(st.data(), IN_FLIGHT)
def test_a_plan_for_the_lowest_peak_is_found(data: st.DataObject, count: int) -> None:
    graph = replace(data.draw(training_graphs(max_forward=4)), in_flight=count)
    lowest = lowest_peak(graph, Limits(0.5))
    assert floor(graph)[0] <= lowest <= simulate(graph, keep_all(graph)).peak_bytes
    assume(lowest < simulate(graph, keep_all(graph)).peak_bytes)
    solver = Solver(graph)
    found = solver.lowest_peak(Limits(0.5))
    solution = solver.solve(found, Limits(0.5))
    assert simulate(graph, solution.schedule).peak_bytes <= found


def test_less_than_one_forward_is_refused() -> None:
    with pytest.raises(GraphError, match="in_flight is 0"):
        replace(graphs.chain(), in_flight=0)
