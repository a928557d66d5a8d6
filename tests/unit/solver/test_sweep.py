"""Many budgets at once: each plan fits, none is dearer than that of a smaller budget, and programs are built once."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load, resident_bytes
from planner.errors import InfeasibleBudgetError
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver import backend
from planner.solver.baselines import all_baselines
from planner.solver.solve import Solver, floor, sweep
from tests.support import graphs
from tests.support.strategies import budgets, training_graphs
from tests.support.sweeps import sweep_of


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_a_larger_budget_never_has_a_dearer_plan(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    plain = simulate(graph, keep_all(graph)).peak_bytes
    asked = [*data.draw(st.lists(budgets(graph), min_size=2, max_size=6)), plain]
    found = sweep(graph, asked, Limits(effort=5.0))
    assert set(found) == set(asked)
    times = []
    for budget_bytes, solution in sorted(found.items()):
        if isinstance(solution, Solution):
            timeline = simulate(graph, solution.schedule)
            assert timeline.peak_bytes <= budget_bytes
            assert solution.bound_ns <= timeline.time_ns
            times.append(timeline.time_ns)
        else:
            assert not times, "a smaller budget has a plan"
            assert not isinstance(solution, InfeasibleBudgetError) or floor(graph)[0] > budget_bytes
    event(f"plans: {len(times)}")
    assert isinstance(found[plain], Solution)
    assert times == sorted(times, reverse=True)


def spread(name: str, count: int) -> tuple[graphs.Graph, list[int]]:
    graph = load(name, gradients=False)
    low, high = resident_bytes(graph), simulate(graph, keep_all(graph)).peak_bytes
    return graph, [low + (high - low) * (30 + 65 * n // count) // 100 for n in range(count)]


def test_twenty_budgets_share_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, asked = spread("vit-l", 20)
    built, make = [], backend.Model.__init__
    monkeypatch.setattr(backend.Model, "__init__", lambda self, program: (built.append(program), make(self, program))[1])
    found = Solver(graph).sweep(asked, Limits(effort=20.0))
    plans = [solution for solution in found.values() if isinstance(solution, Solution)]
    assert len(plans) == 20
    plain_ns = simulate(graph, keep_all(graph)).time_ns
    assert all(simulate(graph, plan.schedule).time_ns - plan.bound_ns <= 0.005 * plain_ns for plan in plans)
    assert len(built) <= 16


def test_what_a_sweep_found_helps_the_next_budget() -> None:
    graph, asked = spread("unet-4", 4)
    solver = Solver(graph)
    solver.sweep(asked[1:], Limits(effort=2.0))
    smaller = solver.archive.cheapest(asked[1])
    assert smaller is not None
    between = solver.solve((asked[1] + asked[2]) // 2, Limits(effort=0.0))
    assert simulate(graph, between.schedule).time_ns <= smaller.timeline.time_ns


def test_the_table_names_the_change_from_row_to_row() -> None:
    graph = graphs.blocks(8)
    text = str(sweep_of(graph, [1, 0.6, 0.8, 1.0]))
    assert "InfeasibleBudgetError" in text
    assert "100.0%" in text
    assert "+" in text and "-0" in text
    assert "for this backward order at these costs" in text


@settings(deadline=None, max_examples=7)
@given(st.data())
def test_the_lowest_peak_is_not_above_what_people_do_today(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    lowest = Solver(graph).lowest_peak(Limits(effort=5.0))
    for _, schedule in all_baselines(graph, lowest):
        assert lowest <= simulate(graph, schedule).peak_bytes
