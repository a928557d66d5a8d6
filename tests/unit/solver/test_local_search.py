"""Local search: what it returns fits, is valid, and never got dearer; it finds what keeping sets cannot."""

from __future__ import annotations

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load
from planner.graph.floor import floor
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.solver.baselines import all_baselines
from planner.solver.local_search import LocalSearch
from planner.solver.work import Work
from tests.support import graphs
from tests.support.strategies import budgets, training_graphs


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_move_keeps_the_schedule_valid_within_the_budget_and_no_dearer(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    budget_bytes = data.draw(budgets(graph))
    search = LocalSearch(graph, budget_bytes)
    starts = [keep_all(graph), *(schedule for _, schedule in all_baselines(graph, budget_bytes))]
    steps = search.repair(list(data.draw(st.sampled_from(starts)).steps), Work())
    event(f"repaired: {steps is not None}")
    assume(steps is not None)
    assert steps is not None
    shrunk = search.shrink(steps, Work())
    improved = [shrunk, *search.improve(shrunk, Work())][-1]
    squeezed = search.squeeze(shrunk, Work())
    timelines = [simulate(graph, Schedule(tuple(found))) for found in (steps, shrunk, improved, squeezed)]
    event(f"shrunk: {len(shrunk) < len(steps)}")
    event(f"improved: {timelines[2].time_ns < timelines[1].time_ns}")
    assert all(timeline.peak_bytes <= budget_bytes for timeline in timelines)
    event(f"squeezed: {timelines[3].time_ns < timelines[1].time_ns}")
    assert timelines[0].time_ns >= timelines[1].time_ns >= max(timelines[2].time_ns, timelines[3].time_ns)
    assert search.time_ns(improved) == timelines[2].time_ns


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_after_shrinking_no_single_recompute_can_go(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    budget_bytes = data.draw(budgets(graph))
    search = LocalSearch(graph, budget_bytes)
    steps = search.repair(list(range(len(graph.ops))), Work())
    assume(steps is not None)
    assert steps is not None
    schedule = Schedule(tuple(search.shrink(steps, Work())))
    for t in schedule.recomputes():
        shorter = Schedule(schedule.steps[:t] + schedule.steps[t + 1 :])
        event("a recompute stayed")
        assert simulate(graph, shorter).peak_bytes > budget_bytes


def test_nothing_helps_below_the_floor_and_without_work() -> None:
    graph = graphs.skip()
    assert LocalSearch(graph, floor(graph)[0] - 1).repair(list(range(len(graph.ops))), Work()) is None
    assert LocalSearch(graph, 26).repair(list(range(len(graph.ops))), Work(0.0)) is None


def test_a_schedule_squeezed_into_less_comes_out_cheaper() -> None:
    """Evictions are chosen one by one, so a first fit is rarely the best; another way down to the budget may be."""
    graph = load("unet-4", gradients=True)
    plain = simulate(graph, keep_all(graph))
    search = LocalSearch(graph, plain.peak_bytes * 45 // 100)
    steps = search.repair(list(range(len(graph.ops))), Work())
    assert steps is not None
    shrunk = search.shrink(steps, Work())
    squeezed = search.squeeze(shrunk, Work())
    assert simulate(graph, Schedule(tuple(squeezed))).peak_bytes <= search.budget_bytes
    assert search.time_ns(shrunk) - search.time_ns(squeezed) > 0.003 * plain.time_ns
    assert search.squeeze(shrunk, Work(0.0)) == shrunk
