"""The scheduler: slices double, who gets nowhere waits, and a search stops at its gap, its work, its patience or the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver import pipeline, work
from planner.solver.baselines import all_baselines
from planner.solver.pipeline import BudgetSearch, Stage, search_all
from planner.solver.problem import Models, Problem
from planner.solver.search import Archive, Search
from planner.solver.solve import Solver, solve, sweep
from planner.solver.stages import Progress
from planner.solver.tuning import FIRST_SLICE, PATIENCE
from planner.solver.work import Work, begin
from tests.support import graphs
from tests.support.exhaustive import exhaustive
from tests.support.strategies import budgets, training_graphs

BUDGET = 24
"""Of the chain: the plain step, 20 ns, does not fit; SMALLER does."""
SMALLER = Schedule((0, 1, 2, 3, 0, 4, 5))

Says = Callable[[Search, int], bool]
"""What a fake stage does in its n-th slice, and whether it has learnt something."""


def nothing(search: Search, n: int) -> bool:
    return False


def something(search: Search, n: int) -> bool:
    return True


def bounds_in(*slices: int) -> Says:
    """Raises the bound by a nanosecond in these slices."""

    def says(search: Search, n: int) -> bool:
        if n in slices:
            search.raise_bound(search.bound_ns + 1)
        return False

    return says


class Recorded:
    """Fake stages in the place of the real ones, which write down who was asked, with how much to spend."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []
        self.stages: list[Stage] = []

    def stage(self, name: str, says: Says, *, slices: int = 1000, **when: object) -> None:
        """A stage that spends each slice as a whole and ends after so many."""

        def strategy(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
            for n in range(slices):
                self.asked.append((name, round(work.left / FIRST_SLICE, 2)))
                work.charge(work.left)
                yield Progress.ADVANCED if says(search, n) else Progress.TRIED

        self.stages.append(Stage(name, strategy, **when))  # type: ignore[arg-type]

    def run(
        self, monkeypatch: pytest.MonkeyPatch, *, effort: float = 100.0, gap: float = 0.0, find: bool = True
    ) -> BudgetSearch:
        monkeypatch.setattr(pipeline, "PIPELINE", tuple(self.stages))
        one, self.work = a_run(BUDGET, gap, find=find), Work(effort)
        search_all([one], self.work)
        return one

    def slices(self, name: str) -> list[float]:
        return [units for asked, units in self.asked if asked == name]

    @property
    def names(self) -> str:
        return " ".join(name for name, _ in self.asked)


def a_run(budget_bytes: int, gap: float = 0.0, *, find: bool = True) -> BudgetSearch:
    graph = graphs.chain()
    archive = Archive(graph)
    if find:
        archive.offer(SMALLER, "a test")
    return BudgetSearch(Problem(Models(graph), budget_bytes, gap), Search(archive, budget_bytes))


@pytest.fixture
def record() -> Recorded:
    return Recorded()


def test_slices_double_and_stages_take_turns(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    record.stage("a", something)
    record.stage("b", something)
    one = record.run(monkeypatch, effort=30 * FIRST_SLICE)
    assert record.names == "a b a b a b a b"
    assert record.slices("a") == record.slices("b") == [1, 2, 4, 8]
    assert record.work.is_over and one.spent == pytest.approx(30 * FIRST_SLICE)


def test_a_search_stops_at_its_work_in_the_middle_of_a_slice(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    record.stage("a", something)
    record.stage("b", something)
    record.run(monkeypatch, effort=5 * FIRST_SLICE)
    assert record.asked == [("a", 1), ("b", 1), ("a", 2), ("b", 1)]
    assert record.work.meter.spent == pytest.approx(5 * FIRST_SLICE)


def test_a_stage_that_got_nowhere_twice_waits_until_the_state_changes(record: Recorded, monkeypatch) -> None:
    record.stage("stuck", nothing)
    record.stage("slow", bounds_in(4), slices=8)
    record.run(monkeypatch)
    # `slow` says of each slice that it learnt nothing: it would wait as well, had its bound not changed the state.
    assert record.names == "stuck slow stuck slow"


def test_a_stage_that_waits_goes_on_where_it_was_once_others_have_changed_something(record: Recorded, monkeypatch) -> None:
    changes = bounds_in(3)
    record.stage("stuck", nothing)
    record.stage("slow", lambda search, n: changes(search, n) or True, slices=7)
    record.run(monkeypatch)
    assert record.names == "stuck slow stuck slow slow slow stuck slow slow slow"
    assert record.slices("stuck") == [1, 2, 4]


def test_a_stage_that_changes_the_state_itself_goes_on(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    record.stage("a", bounds_in(1, 3))
    record.run(monkeypatch)
    assert record.slices("a") == [1, 2, 4, 8, 16, 32]  # twice nowhere after its last bound


def test_an_ended_stage_is_not_asked_again(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def short(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
        started.append(1)
        yield Progress.ADVANCED

    record.stages.append(Stage("short", short))
    record.stage("b", bounds_in(0, 1, 2), slices=4)
    one = record.run(monkeypatch)
    assert len(started) == 1 and record.names == "b b b b"
    assert one.is_done, "nothing is left to try"


def test_a_search_stops_at_its_gap_at_once(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def proves(search: Search, n: int) -> bool:
        search.raise_bound(25 if n == 1 else 20)
        return True

    record.stage("a", something)
    record.stage("b", proves)
    record.stage("c", something)
    one = record.run(monkeypatch)
    assert record.names == "a b c a b", "the optimum is proven"
    assert one.search.gap == 0.0 and one.is_done


def test_a_gap_that_is_wide_enough_stops_it_before_its_first_turn(record: Recorded, monkeypatch) -> None:
    record.stage("a", something)
    assert record.run(monkeypatch, gap=0.25).is_done and record.asked == []
    assert not record.run(monkeypatch, gap=0.2, effort=1.0).is_done and record.asked != []


def test_without_a_schedule_no_gap_is_wide_enough(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def finds(search: Search, n: int) -> bool:
        if n == 2:
            search.archive.offer(SMALLER, "a test")
        return True

    record.stage("a", finds)
    record.run(monkeypatch, gap=float("inf"), find=False)
    assert record.names == "a a a"


def test_what_is_left_of_the_gap_may_not_be_worth_what_was_spent(record: Recorded, monkeypatch) -> None:
    """The gap is a quarter until the bound is one nanosecond, a twentieth of the step, from the plan."""
    record.stage("a", bounds_in(0, 1, 2, 3), slices=100)
    record.stage("b", something)
    monkeypatch.setattr(pipeline, "LOOSE_GAP", 0.055)  # not worth everything
    patience = PATIENCE * 5.0**2
    one = record.run(monkeypatch, effort=1e9)
    assert one.search.gap == pytest.approx(0.05)
    assert patience <= one.spent < 4 * patience


def test_a_stage_waits_while_the_gap_is_smaller_than_it_is_for(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    record.stage("wide", something, min_gap=0.22)
    record.stage("a", bounds_in(1), slices=4)
    record.run(monkeypatch)
    assert record.names == "wide a wide a a a"


def test_a_stage_waits_for_its_first_turn(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    record.stage("late", something, first_turn=2)
    record.stage("a", something)
    record.run(monkeypatch, effort=40 * FIRST_SLICE)
    assert record.names.startswith("a a late a late a")
    assert record.slices("late")[:2] == [1, 2]


def test_a_stage_that_waits_for_its_turn_has_it_though_nobody_else_is_left(record: Recorded, monkeypatch) -> None:
    record.stage("late", something, slices=1, first_turn=5)
    record.stage("a", something, slices=1)
    assert record.run(monkeypatch).is_done
    assert record.names == "a late"


def test_a_stage_waits_for_a_schedule_or_until_there_is_one(record: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def finds(search: Search, n: int) -> bool:
        if n == 1:
            search.archive.offer(SMALLER, "a test")
        return True

    record.stage("before", something, found=False)
    record.stage("after", something, found=True)
    record.stage("finds", finds)
    record.run(monkeypatch, effort=20 * FIRST_SLICE, find=False)
    assert record.names.startswith("before finds before finds after finds after")


def test_many_searches_take_turns_the_widest_gap_first_and_who_is_done_has_no_more(record: Recorded, monkeypatch) -> None:
    asked: list[int] = []

    def strategy(problem: Problem, search: Search, work: Work) -> Iterator[Progress]:
        for n in range(4):
            asked.append(problem.budget_bytes)
            work.charge(work.left)
            if n == 1 and problem.budget_bytes == 24:
                search.raise_bound(25)
            yield Progress.ADVANCED

    monkeypatch.setattr(pipeline, "PIPELINE", (Stage("a", strategy),))
    archive, models = Archive(graphs.chain()), Models(graphs.chain())
    archive.offer(SMALLER, "a test")
    archive.raise_bound(24, 22)
    runs = [BudgetSearch(Problem(models, budget, 0.0), Search(archive, budget)) for budget in (24, 25, 26)]
    meter = Work()
    search_all(runs, meter)
    # 24 bytes: at most 3 ns from the optimum, and proven in the second turn; the others, 5 ns.
    assert asked == [25, 26, 24, 25, 26, 24, 25, 26, 25, 26]
    assert all(each.is_done for each in runs)
    assert sum(each.spent for each in runs) == pytest.approx(meter.meter.spent)


def test_a_share_of_work_spends_from_the_same_meter() -> None:
    whole = Work(10.0)
    share = whole.share(4.0)
    share.charge(3.0)
    assert (whole.left, share.left, share.is_over) == (7.0, 1.0, False)
    whole.charge(1.0)
    assert share.is_over and share.left == 0.0
    assert whole.share(100.0).left == 6.0, "no more than there is"


def test_a_passed_backstop_leaves_nothing_to_spend() -> None:
    late = begin(Limits(effort=5.0, time_limit_s=0.0))
    assert late.left == 5.0
    late.charge(0.0)
    assert late.meter.is_late and late.is_over and late.share(1.0).is_over
    in_time = begin(Limits(effort=5.0))
    in_time.charge(1.0)
    assert not in_time.meter.is_late and in_time.left == 4.0


def valid(graph: Graph, budget_bytes: int, solution: Solution) -> None:
    """It fits, nothing beats its bound, and what people do today is no better."""
    timeline, best = simulate(graph, solution.schedule), exhaustive(graph, budget_bytes)
    assert timeline.peak_bytes <= budget_bytes
    assert best is not None
    assert solution.bound_ns <= simulate(graph, best).time_ns <= timeline.time_ns
    for _, schedule in all_baselines(graph, budget_bytes):
        today = simulate(graph, schedule)
        assert today.peak_bytes > budget_bytes or today.time_ns >= timeline.time_ns


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_search_that_is_ended_anywhere_has_a_valid_answer(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    limits = data.draw(
        st.sampled_from((Limits(time_limit_s=0.0), *(Limits(effort=units) for units in (0.0, 2e-4, 1e-3, 5e-3, 0.05))))
    )
    try:
        solution = Solver(graph, reorder=False).solve(budget_bytes, limits, gap=1e-6)
    except (InfeasibleBudgetError, NoScheduleFoundError) as error:
        event(type(error).__name__)
        for _, schedule in all_baselines(graph, budget_bytes):
            assert simulate(graph, schedule).peak_bytes > budget_bytes
    else:
        event(f"{solution.status} with {limits}")
        valid(graph, budget_bytes, solution)


def clock(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """A clock that jumps past every backstop after it was read so many times."""
    reads = iter(range(calls))
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: 0.0 if next(reads, None) is not None else 1e9))


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 10, 20, 40])
def test_the_clock_ends_a_search_wherever_it_is(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in graphs.SMALL.values():
        graph = make()
        plain = simulate(graph, keep_all(graph)).peak_bytes
        with monkeypatch.context() as patch:
            clock(patch, calls)
            try:
                valid(graph, plain - 1, solve(graph, plain - 1, gap=1e-6, reorder=False))
            except NoScheduleFoundError as error:
                assert error.lowest_bytes == simulate(graph, keep_all(graph)).peak_bytes
        with monkeypatch.context() as patch:
            clock(patch, calls)
            found = sweep(graph, [plain - 1, plain, plain + 1])
        assert isinstance(found[plain], Solution) and isinstance(found[plain + 1], Solution)


def test_every_stage_has_a_name_of_its_own() -> None:
    assert len({stage.name for stage in pipeline.PIPELINE}) == len(pipeline.PIPELINE)
