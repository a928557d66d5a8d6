"""Neighbourhood search: what it returns is valid, fits, and is cheaper; on small graphs it reaches the optimum."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.solver.baselines import recompute_all
from planner.solver.exhaustive import Rules, exhaustive
from planner.solver.local_search import LocalSearch
from planner.solver.neighbourhood import Neighbourhood
from planner.solver.work import Work
from tests import graphs
from tests.strategies import budgets, training_graphs


def settled(search: Neighbourhood, steps: list[int]) -> list[int]:
    """The schedule improved until the search has nothing better to say."""
    while not search.is_settled:
        better = search.improve(steps, Work())
        if better is not None:
            assert search.search.time_ns(better) < search.search.time_ns(steps)
            steps = better
    return steps


def test_it_reaches_the_optimum_of_small_steps_nearly_always() -> None:
    """From a wasteful schedule that fits. About 2 in 100 are missed, in runs of like draws: few draws would judge one run."""
    counts: Counter[str] = Counter()

    @settings(deadline=None, max_examples=300, database=None, derandomize=True)
    @given(st.data())
    def attempts(data: st.DataObject) -> None:
        graph = data.draw(training_graphs(max_forward=5))
        budget_bytes = data.draw(budgets(graph))
        start = LocalSearch(graph, budget_bytes).repair(list(recompute_all(graph).steps), Work())
        assume(start is not None)
        assert start is not None
        before = simulate(graph, Schedule(tuple(start)))
        after = simulate(graph, Schedule(tuple(settled(Neighbourhood(graph, budget_bytes, depth=4), start))))
        best = exhaustive(graph, budget_bytes, Rules(backward_ops=False))
        assert best is not None
        optimum = simulate(graph, best).time_ns
        assert after.peak_bytes <= budget_bytes
        assert optimum <= after.time_ns <= before.time_ns
        counts["improved"] += after.time_ns < before.time_ns
        counts["optimal" if after.time_ns == optimum else "missed"] += 1

    attempts()
    assert counts["improved"] >= 3
    assert counts["optimal"] >= 19 * counts["missed"]


def test_few_choices_at_a_time_keep_to_the_budget() -> None:
    graph = graphs.blocks(6)
    plain = simulate(graph, Schedule(tuple(range(len(graph.ops)))))
    budget_bytes = plain.peak_bytes * 2 // 3
    start = LocalSearch(graph, budget_bytes).repair(list(range(len(graph.ops))), Work())
    assert start is not None
    search = Neighbourhood(graph, budget_bytes)
    for target in (4, 12):
        slots, everything = search._slots(start, target)
        assert not everything
        assert 0 < sum(not slot.fixed for slot in slots) < len(slots)
        better, _ = search._solve(start, slots, Work())
        if better is not None:
            timeline = simulate(graph, Schedule(tuple(better)))
            assert timeline.peak_bytes <= budget_bytes
            assert timeline.time_ns < search.search.time_ns(start)


def test_a_program_that_is_cut_short_improves_nothing_and_settles_nothing() -> None:
    """The next one opens less, and the same chance gives the same schedule again."""
    graph = graphs.blocks(30)
    steps = list(range(len(graph.ops)))
    budget_bytes = simulate(graph, Schedule(tuple(steps))).peak_bytes * 2 // 3
    start = LocalSearch(graph, budget_bytes).repair(steps, Work())
    assert start is not None
    short = Neighbourhood(graph, budget_bytes)
    for _ in range(6):
        assert short.improve(start, Work(0.0)) is None
    assert not short.is_settled
    first, second = Neighbourhood(graph, budget_bytes), Neighbourhood(graph, budget_bytes)
    for _ in range(4):
        works = Work(0.2), Work(0.2)
        assert first.improve(start, works[0]) == second.improve(start, works[1])
        assert works[0].meter.spent == works[1].meter.spent
