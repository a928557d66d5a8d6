"""The archive keeps what nothing beats, and no bound that a schedule contradicts."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.solver.search import Archive, Search
from planner.solver.work import Work
from tests.support import graphs
from tests.support.strategies import budgets, random_schedule, training_graphs

SMALLER = Schedule((0, 1, 2, 3, 0, 4, 5))
"""Of the chain: 23 bytes and 25 ns, where the plain step has 27 and 20."""


@pytest.fixture
def archive() -> Archive:
    found = Archive(graphs.chain())
    timeline = simulate(found.graph, SMALLER)
    assert (timeline.peak_bytes, timeline.time_ns) == (23, 25)
    assert simulate(found.graph, keep_all(found.graph)).peak_bytes == 27
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_only_what_nothing_beats_is_kept(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    archive, offered = Archive(graph), [keep_all(graph)]
    for _ in range(data.draw(st.integers(1, 6))):
        offered.append(random_schedule(data.draw, graph))
        assert archive.offer(offered[-1], "chance") == simulate(graph, offered[-1])
    found = [simulate(graph, schedule) for schedule in offered]
    event(f"entries: {len(archive._entries)}")
    for budget_bytes in {timeline.peak_bytes - less for timeline in found for less in (0, 1)}:
        fitting = [timeline.time_ns for timeline in found if timeline.peak_bytes <= budget_bytes]
        best = archive.cheapest(budget_bytes)
        assert (best is None) == (not fitting)
        if best is not None:
            assert best.timeline == simulate(graph, best.schedule)
            assert best.timeline.peak_bytes <= budget_bytes
            assert best.timeline.time_ns == min(fitting)
    assert archive.lowest.timeline.peak_bytes == min(timeline.peak_bytes for timeline in found)


def test_a_bound_holds_for_every_smaller_budget_and_for_no_larger_one(archive: Archive) -> None:
    archive.raise_bound(24, 23)
    assert [archive.bound_ns(budget) for budget in (20, 24, 25)] == [23, 23, 20]
    archive.raise_bound(24, 22)
    assert archive.bound_ns(24) == 23, "a bound never falls"
    archive.raise_bound(22, 30)
    assert [archive.bound_ns(budget) for budget in (22, 23)] == [30, 23]


def test_a_found_schedule_discards_every_bound_that_it_contradicts(archive: Archive) -> None:
    for budget, time_ns in ((22, 40), (23, 26), (24, 25), (25, 30), (26, 24)):
        archive.raise_bound(budget, time_ns)
    assert archive.bound_ns(23) == 30
    archive.offer(SMALLER, "a test")
    # 22 bytes are less than it takes; 26 ns within 23 bytes and 30 within 25 were wrong; 25 and 24 may be true.
    assert archive._bounds == {22: 40, 24: 25, 26: 24}
    assert [archive.bound_ns(budget) for budget in (22, 23, 25, 27)] == [40, 25, 24, 20]


def test_a_wrong_bound_for_a_large_budget_is_forgotten_for_the_smaller_ones_too(archive: Archive) -> None:
    archive.raise_bound(26, 26)
    assert archive.bound_ns(10) == 26
    archive.offer(SMALLER, "a test")
    assert archive.bound_ns(10) == archive.bound_ns(26) == 20


def test_a_bound_that_a_schedule_at_hand_contradicts_is_refused(archive: Archive) -> None:
    archive.offer(SMALLER, "a test")
    for budget in (23, 26):
        archive.raise_bound(budget, 26)
        assert archive.bound_ns(budget) == 20
    archive.raise_bound(27, 21)
    assert archive.bound_ns(27) == 20, "the plain step fits and takes 20 ns"
    archive.raise_bound(22, 26)
    archive.raise_bound(23, 25)
    assert [archive.bound_ns(budget) for budget in (22, 23)] == [26, 25]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_order_of_schedules_and_bounds_leaves_a_contradiction(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    archive = Archive(graph)
    asked = data.draw(st.lists(budgets(graph), min_size=1, max_size=3))
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            archive.offer(random_schedule(data.draw, graph), "chance")
        else:
            more = data.draw(st.integers(0, archive.graph.plain_ns))
            archive.raise_bound(data.draw(st.sampled_from(asked)), archive.graph.plain_ns + more)
        for budget_bytes in asked:
            best = archive.cheapest(budget_bytes)
            assert best is None or archive.bound_ns(budget_bytes) <= best.timeline.time_ns
            assert Search(archive, budget_bytes).gap >= 0
    event(f"bounds: {len(archive._bounds)}, entries: {len(archive._entries)}")


def test_the_gap_is_that_between_the_best_and_the_bound(archive: Archive) -> None:
    search = Search(archive, 24)
    assert search.best is None and search.gap == 1.0
    nothing = search.state
    archive.offer(SMALLER, "a test")
    assert search.gap == (25 - 20) / 20
    found = search.state
    assert search.raise_bound(24) and not search.raise_bound(23) and not search.raise_bound(24)
    assert search.gap == (25 - 24) / 20
    assert not search.raise_bound(26), "refused"
    assert len({nothing, found, search.state}) == 3


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_was_made_to_fit_fits_and_is_in_the_archive(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    budget_bytes = data.draw(budgets(graph))
    search = Search(Archive(graph), budget_bytes)
    steps = search.fit(list(range(len(graph.ops))), "a test", Work())
    event(f"fits: {steps is not None}")
    if steps is None:
        return
    assert simulate(graph, Schedule(tuple(steps))).peak_bytes <= budget_bytes
    assert search.best is not None
    assert search.best.timeline.time_ns <= simulate(graph, Schedule(tuple(steps))).time_ns


def test_without_work_and_for_what_is_far_off_nothing_is_made_to_fit() -> None:
    graph = graphs.chain()
    plain = list(range(len(graph.ops)))
    assert Search(Archive(graph), 23).fit(plain, "a test", Work()) is not None
    assert Search(Archive(graph), 23).fit(plain, "a test", Work(0.0)) is None
    assert Search(Archive(graph), 23).fit(plain, "a test", Work(), near=1.1) is None
    assert Search(Archive(graph), 23).fit(plain, "a test", Work(), near=1.5) is not None
