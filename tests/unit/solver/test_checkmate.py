"""Checkmate's program against exhaustive search on tiny graphs, and the solver against Checkmate's program on GPT-2."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.results.plan_file import load_graph
from planner.solver.solve import Solver
from tests.support import graphs
from tests.support.checkmate import Reference, checkmate
from tests.support.exhaustive import Rules, exhaustive
from tests.support.merged import merged
from tests.support.paths import ROOT
from tests.support.strategies import budgets, training_graphs

GRAPHS = ROOT / "benchmarks" / "graphs"
SMALL = [pytest.param(make(), id=name) for name, make in graphs.SMALL.items()]
GAP = 1e-5
"""Of the program on a real graph, as a fraction of the plain step's time: below the cost of the cheapest op."""


def in_captured_order(schedule: Schedule) -> Schedule:
    """The schedule of Checkmate's class that runs the same ops in every stage."""
    steps: list[int] = []
    stage: set[int] = set()
    done = 0
    for i in schedule.steps:
        stage.add(i)
        if i == done:
            steps += sorted(stage)
            stage, done = set(), done + 1
    return Schedule(tuple(steps))


def fits(graph: Graph, schedule: Schedule, budget_bytes: int) -> bool:
    try:
        return simulate(graph, schedule).peak_bytes <= budget_bytes
    except ScheduleError:
        return False


def agree(graph: Graph, budget_bytes: int, *, backward_again: bool) -> str:
    """Hold the program against exhaustive search; returns which case it was.

    Exhaustive search may run the ops of one stage in any order, and one twice. Where its answer fits in captured order,
    the two must be equal; nowhere may the program be cheaper, or find what exhaustive search proves not to be there.
    """
    best = exhaustive(graph, budget_bytes, Rules(backward_ops=backward_again))
    found = checkmate(graph, budget_bytes, backward_again=backward_again)
    if found.schedule is None:
        assert found.status == "infeasible"
        assert best is None or not fits(graph, in_captured_order(best), budget_bytes)
        return "both infeasible" if best is None else "only out of order"
    assert found.status == "optimal"
    assert best is not None
    judged, optimum_ns = simulate(graph, found.schedule), simulate(graph, best).time_ns
    assert judged.peak_bytes <= budget_bytes
    assert judged.time_ns == found.time_ns == pytest.approx(found.bound_ns, abs=1e-3)
    assert found.time_ns >= optimum_ns
    if fits(graph, in_captured_order(best), budget_bytes):
        assert found.time_ns == optimum_ns
        return "equal, with recomputes" if best.recomputes() else "equal"
    return "equal" if found.time_ns == optimum_ns else "cheaper out of order"


def test_the_program_agrees_with_exhaustive_search() -> None:
    counts: Counter[str] = Counter()

    @settings(deadline=None, max_examples=60, database=None)
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        graph = data.draw(training_graphs(max_forward=4))
        counts[agree(graph, data.draw(budgets(graph)), backward_again=False)] += 1

    compare()
    assert counts["equal, with recomputes"] >= 5
    assert counts["cheaper out of order"] + counts["only out of order"] <= counts["equal, with recomputes"]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_program_agrees_with_exhaustive_search_when_backward_ops_run_again(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=4))
    event(agree(graph, data.draw(budgets(graph)), backward_again=True))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_program_agrees_with_exhaustive_search_on_longer_steps(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    event(agree(graph, data.draw(budgets(graph)), backward_again=False))


@pytest.mark.parametrize("backward_again", [False, True])
@pytest.mark.parametrize("graph", SMALL)
def test_every_budget_of_the_small_graphs(graph: Graph, backward_again: bool) -> None:
    plain = simulate(graph, keep_all(graph)).peak_bytes
    cases = [agree(graph, budget, backward_again=backward_again) for budget in range(floor(graph)[0] - 2, plain + 2)]
    assert {"both infeasible", "equal, with recomputes", "equal"} == set(cases)


def output_with_a_sibling() -> Graph:
    """f0 runs again for its large sibling; from then on reads of the output are reads of a second instance of it.

    x --f0--> out (kept), sibling --f1--> m --f2--> loss
    """
    return graphs.graph(
        {"x": 2, "w": 1, "out": 6, "sibling": 8, "m": 4, "loss": 1, "t": 1, "gm": 2, "gs": 2, "dw": 1},
        [graphs.op("f0", "x w", "out sibling", 5), graphs.op("f1", "sibling", "m", 3), graphs.op("f2", "m", "loss", 2, 8)],
        [graphs.op("b2", "m t", "gm", 2), graphs.op("b1", "sibling gm", "gs", 3), graphs.op("b0", "x out gs", "dw", 5)],
        "out loss",
        "dw",
    )


def test_a_second_instance_of_an_output_is_held_or_made_once_more() -> None:
    graph = output_with_a_sibling()
    for budget_bytes, time_ns in ((26, None), (27, 30), (28, 30), (29, 25), (30, 20)):
        assert agree(graph, budget_bytes, backward_again=False).startswith("equal") == (time_ns is not None)
        assert checkmate(graph, budget_bytes).time_ns == (time_ns or float("inf"))


def gpt2(num_layers: int, share: float) -> tuple[Graph, int]:
    """The graph with neighbours merged, and a budget at this share of the way from its floor to its plain peak."""
    graph = merged(load_graph(GRAPHS / f"gpt2-{num_layers}.json.gz"))
    least, plain = floor(graph)[0], simulate(graph, keep_all(graph)).peak_bytes
    return graph, round(least + share * (plain - least))


def solve_is_as_good(graph: Graph, budget_bytes: int, effort: float) -> Reference:
    """The solver's plan is no dearer than Checkmate's, and not cheaper than Checkmate's program can prove possible."""
    reference = checkmate(graph, budget_bytes, effort=effort, gap=GAP)
    assert reference.schedule is not None
    judged = simulate(graph, reference.schedule)
    assert judged.peak_bytes <= budget_bytes
    assert judged.time_ns == reference.time_ns
    solution = Solver(graph, reorder=False).solve(budget_bytes, gap=1e-6)
    found = simulate(graph, solution.schedule)
    assert found.peak_bytes <= budget_bytes
    assert reference.bound_ns - 1 <= found.time_ns <= reference.time_ns
    assert solution.bound_ns <= reference.time_ns
    return reference


@pytest.mark.parametrize("share", [0.95, 0.8])
def test_one_layer_of_gpt2(share: float) -> None:
    assert solve_is_as_good(*gpt2(1, share), effort=60.0).status == "optimal"


@pytest.mark.zoo
@pytest.mark.parametrize(("num_layers", "share"), [(1, 0.7), (1, 0.5), (1, 0.3), (2, 0.9), (2, 0.7)])
def test_gpt2_under_tighter_budgets(num_layers: int, share: float) -> None:
    assert solve_is_as_good(*gpt2(num_layers, share), effort=300.0).status == "optimal"
