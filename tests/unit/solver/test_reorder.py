"""Moving backward ops: always a valid order of the same ops, taken only where the plain peak falls."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, check, keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.solver.baselines import sqrt_segments
from planner.solver.reorder import reordered
from planner.solver.solve import Solver, solve
from tests.support import graphs
from tests.support.strategies import training_graphs


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_moved_graph_is_the_same_step_with_a_lower_peak(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    moved, order = reordered(graph)
    event(f"moved: {moved is not graph}")
    schedule = Schedule(order)
    check(graph, schedule)
    assert [graph.ops[i] for i in order] == list(moved.ops)
    peak, plain = simulate(graph, schedule).peak_bytes, simulate(graph, keep_all(graph)).peak_bytes
    assert peak == simulate(moved, keep_all(moved)).peak_bytes
    assert peak < plain if moved is not graph else order == keep_all(graph).steps


def late_weight_gradient() -> Graph:
    """The weight gradient of the last layer is made at the very end, and holds what it reads until then."""
    op = graphs.op
    return graphs.graph(
        {"x": 2, "w": 1, "a": 20, "c": 6, "loss": 1, "t": 1, "gc": 6, "ga": 20, "dw": 1, "dx": 2},
        [op("f0", "x", "a", 5), op("f1", "a w", "c", 3), op("f2", "c", "loss", 2)],
        [op("b2", "c t", "gc", 2), op("b1", "gc w", "ga", 3), op("b0", "ga x", "dx", 5), op("bw", "a gc", "dw", 4)],
        "loss",
        "dx dw",
    )


def test_a_late_weight_gradient_moves_forward_and_the_plan_is_of_the_captured_graph() -> None:
    graph = late_weight_gradient()
    moved, order = reordered(graph)
    assert order == (0, 1, 2, 3, 6, 4, 5)
    peak = simulate(moved, keep_all(moved)).peak_bytes
    assert peak < simulate(graph, keep_all(graph)).peak_bytes
    solution = solve(graph, peak)
    assert solution.schedule == Schedule(order)
    assert simulate(graph, solution.schedule).peak_bytes == peak
    assert solution.bound_ns == simulate(graph, solution.schedule).time_ns


@pytest.mark.parametrize("effort", [0.0, 0.05, 2.0])
def test_a_moved_graph_is_never_planned_worse_than_by_what_people_do_in_captured_order(effort: float) -> None:
    """However little may be spent."""
    graph = load("rnn", gradients=False)
    assert reordered(graph)[0] is not graph
    timeline = simulate(graph, sqrt_segments(graph))
    solution = solve(graph, timeline.peak_bytes, Limits(effort=effort))
    assert simulate(graph, solution.schedule).peak_bytes <= timeline.peak_bytes
    assert simulate(graph, solution.schedule).time_ns <= timeline.time_ns


def test_a_real_step_gains_and_a_sweep_across_both_floors_never_costs_more_with_more_memory() -> None:
    graph = load("resnet50")
    moved, _ = reordered(graph)
    assert simulate(moved, keep_all(moved)).peak_bytes < simulate(graph, keep_all(graph)).peak_bytes
    low, high = sorted((floor(graph)[0], floor(moved)[0]))
    budgets = [low - 1, low, high, int(high * 1.5), high * 2]
    found = Solver(graph).sweep(budgets, Limits(effort=4.0))
    assert isinstance(found[low - 1], Exception)
    times = []
    for budget in budgets[1:]:
        solution = found[budget]
        if not isinstance(solution, Exception):
            timeline = simulate(graph, solution.schedule)
            assert timeline.peak_bytes <= budget
            times.append(timeline.time_ns)
    assert len(times) >= 2
    assert times == sorted(times, reverse=True)
