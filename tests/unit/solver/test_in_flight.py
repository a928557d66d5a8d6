"""Several forwards in flight: what simulate counts, and plans with their bounds against every kind of schedule."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from planner.errors import GraphError, InfeasibleBudgetError
from planner.graph.floor import floor
from planner.graph.graph import RESIDENT_KINDS
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.in_flight import bounding_limits, fitting_limits, with_saved_limit, without_saved_limit
from planner.solver.solve import Solver, lowest_peak, solve
from tests.support import graphs
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
    bounded = with_saved_limit(graph, workspace)
    schedule = data.draw(schedules(bounded))
    found = simulate(bounded, schedule)
    alone = simulate(graph, without_saved_limit(schedule, graph))
    saved = sum(graph.value[name].nbytes for name in alone.saved)
    resident = sum(value.nbytes for value in graph.values if value.kind in RESIDENT_KINDS) - graph.tangent_bytes
    assert found.peak_bytes == max(alone.peak_bytes, resident + saved + workspace)
    assert found.time_ns == alone.time_ns


SIZES = st.integers(0, 60)


@settings(deadline=None, max_examples=500)
@given(IN_FLIGHT, st.lists(SIZES, unique=True).map(sorted), SIZES, SIZES, SIZES)
def test_limits_hold_all_schedules_that_fit_or_only_such(
    count: int, more: list[int], saved: int, needed: int, budget: int
) -> None:
    """A schedule is three sizes here: resident bytes (of the graph), saved bytes, and what it needs beyond them."""
    graph = replace(graphs.chain(), in_flight=count)
    resident, tried = graph.resident_bytes, [0, *(t for t in more if t)]
    fits = resident + count * saved + needed <= budget
    event(f"fits: {fits}")

    def is_within(limit: tuple[int, int]) -> bool:
        workspace, peak = limit
        return resident + saved + max(needed, workspace) <= peak

    if fits:
        assert any(map(is_within, bounding_limits(graph, budget, tried)))
    else:
        assert not any(map(is_within, fitting_limits(graph, budget, tried)))


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


def test_a_chain_of_blocks_is_planned_to_the_optimum_for_its_saved_limits() -> None:
    graph = replace(graphs.blocks(8), in_flight=4)
    plain = simulate(graph, keep_all(graph))
    solution = solve(graph, plain.peak_bytes * 6 // 10, Limits(6.0))
    timeline = simulate(graph, solution.schedule)
    assert timeline.peak_bytes <= plain.peak_bytes * 6 // 10
    assert timeline.time_ns - solution.bound_ns <= 0.02 * plain.time_ns
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
