from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load, resident_bytes
from planner.graph.floor import floor
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import Simulator, simulate
from planner.solver import stages
from planner.solver.certificate import Certificate
from planner.solver.lazy import lazy_schedule
from planner.solver.problem import Models, Problem
from planner.solver.search import Archive, Search
from planner.solver.solve import solve
from planner.solver.work import Meter, Work
from tests.support import graphs
from tests.support.exhaustive import Rules, exhaustive
from tests.support.solvers import optimum
from tests.support.strategies import budgets, training_graphs


class Witness(Search):
    """A search that remembers what was said to be proven: the archive would refuse what a schedule at hand contradicts."""

    def __init__(self, archive: Archive, budget_bytes: int) -> None:
        super().__init__(archive, budget_bytes)
        self.said: list[int] = []

    def raise_bound(self, time_ns: int) -> bool:
        self.said.append(time_ns)
        return super().raise_bound(time_ns)


def rounds(search: Search, models: Models, work: Work | None = None) -> Iterator[stages.Progress]:
    """The certificate stage."""
    return stages.certificate(Problem(models, search.budget_bytes), search, work or Work())


def certified(graph: Graph, budget_bytes: int, work: Work | None = None) -> Witness:
    """What the certificate stage says until it has nothing to add, or work is over."""
    search, work = Witness(Archive(graph), budget_bytes), work or Work()
    for _ in rounds(search, Models(graph), work):
        if work.is_over:
            break
    return search


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_one_cut_anywhere_is_a_bound(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    cut = data.draw(st.sampled_from(range(len(graph.ops))))
    found = Certificate(graph).bound(budget_bytes, (cut,), Work(), relax=False)
    event(f"bites: {found.time_ns > sum(op.cost_ns for op in graph.ops)}")
    assert found.is_final
    assert found.time_ns <= optimum(graph, budget_bytes)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_several_cuts_are_a_bound_and_no_weaker_than_one(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    cuts = sorted(data.draw(st.sets(st.sampled_from(range(len(graph.ops))), min_size=2, max_size=3)))
    several = Certificate(graph).bound(budget_bytes, tuple(cuts), Work(), relax=False).time_ns
    last = Certificate(graph).bound(budget_bytes, tuple(cuts[-1:]), Work(), relax=False).time_ns
    event(f"bites: {several > sum(op.cost_ns for op in graph.ops)}, stronger: {several > last}")
    assert last <= several <= optimum(graph, budget_bytes)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_bound_holds_however_little_work_there_is(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    best, plain = optimum(graph, budget_bytes), sum(op.cost_ns for op in graph.ops)
    for work in (Work(0.0), Work(data.draw(st.sampled_from((1e-4, 1e-3, 1e-2)))), Work(meter=Meter(0.0)), Work()):
        search = certified(graph, budget_bytes, work)
        assert all(plain <= ns <= best for ns in search.said)
        assert plain <= search.bound_ns <= best
    event(f"bites: {search.bound_ns > plain}, the optimum: {search.bound_ns == best}")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_budget_after_budget_the_bounds_hold_and_never_rise(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    archive, models, asked = Archive(graph), Models(graph), data.draw(st.lists(budgets(graph), min_size=2, max_size=4))
    for budget_bytes in asked:
        search = Witness(archive, budget_bytes)
        for _ in rounds(search, models):
            pass
        assert all(ns <= optimum(graph, budget_bytes) for ns in search.said)
    known = [archive.bound_ns(budget_bytes) for budget_bytes in sorted(asked)]
    event(f"bites: {max(known) > sum(op.cost_ns for op in graph.ops)}")
    assert known == sorted(known, reverse=True)


@pytest.mark.parametrize("relax", [False, True])
def test_a_bound_that_is_cut_short_says_so_and_becomes_what_it_is_at_once(relax: bool) -> None:
    graph = load("unet-4", gradients=False)
    budget_bytes = simulate(graph, keep_all(graph)).peak_bytes * 6 // 10
    plain = sum(op.cost_ns for op in graph.ops)
    bounds = Certificate(graph)
    cut = bounds.cuts.ranked(budget_bytes)[0]
    at_once = Certificate(graph).bound(budget_bytes, (cut,), Work(), relax=relax)
    short = bounds.bound(budget_bytes, (cut,), Work(0.0), relax=relax)
    assert not short.is_final and plain <= short.time_ns <= at_once.time_ns
    assert bounds.bound(budget_bytes, (cut,), Work(), relax=relax).time_ns == at_once.time_ns > plain
    assert at_once.is_final


@pytest.mark.parametrize("name", ["chain", "two_outputs", "statistics", "dropout"])
def test_the_bound_meets_the_optimum_where_the_first_stages_are_tight(name: str) -> None:
    graph = graphs.SMALL[name]()
    peak = simulate(graph, keep_all(graph)).peak_bytes
    best, plain = optimum(graph, peak - 1), sum(op.cost_ns for op in graph.ops)
    assert plain < certified(graph, peak - 1).bound_ns == best


def test_the_cuts_that_are_ranked_first_are_about_the_best_of_all() -> None:
    graph = load("unet-4", gradients=False)
    bounds, plain = Certificate(graph), simulate(graph, keep_all(graph))
    for budget_bytes in (plain.peak_bytes // 2, plain.peak_bytes * 4 // 5):
        found = {
            cut: bounds.bound(budget_bytes, (cut,), Work(), relax=True).time_ns - plain.time_ns
            for cut in bounds.cuts.ranked(budget_bytes)
        }
        assert max(found[cut] for cut in bounds.cuts.ranked(budget_bytes)[:3]) >= 0.97 * max(found.values()) > 0
        assert min(found.values()) < 0.5 * max(found.values())


def test_cuts_at_the_hottest_ops_raise_a_bound_near_the_floor() -> None:
    graph = load("resnet50", gradients=False)
    budget_bytes, models = floor(graph)[0] * 107 // 100, Models(graph)
    plain, search = sum(op.cost_ns for op in graph.ops), Witness(Archive(graph), budget_bytes)
    cut = models.certificate.cuts.ranked(budget_bytes)[0]
    single = models.certificate.bound(budget_bytes, (cut,), Work(), gap=0.0001, relax=False)
    for _ in islice(rounds(search, models), 5):  # three single cuts, two rounds
        pass
    assert (search.bound_ns - plain) > 1.2 * (single.time_ns - plain) > 0
    assert search.best is not None
    assert simulate(graph, search.best.schedule).time_ns >= search.bound_ns


def test_rounds_of_the_certificate_meet_the_plan_they_hint_at() -> None:
    """Each cuts where the last schedule broke the budget, until bound and schedule are two tenths of a percent apart."""
    graph = load("unet-4", gradients=False)
    plain = simulate(graph, keep_all(graph))
    budget_bytes = resident_bytes(graph) + (plain.peak_bytes - resident_bytes(graph)) * 45 // 100
    search, found = Witness(Archive(graph), budget_bytes), []
    for _ in rounds(search, Models(graph)):
        found.append(search.bound_ns)
        if search.gap <= 0.002:
            break
    assert search.gap <= 0.002
    assert search.best is not None and search.best.source.startswith("certificate")
    assert found == sorted(found) and max(search.said) <= search.best.timeline.time_ns
    assert found[-1] - plain.time_ns > 1.05 * (found[0] - plain.time_ns) > 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_hint_has_alive_at_every_cut_what_it_says_and_no_more(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    names = sorted(name for op in graph.ops[: graph.num_forward_ops] for name in op.writes if name not in graph.pinned)
    sets = st.sets(st.sampled_from(names)) if names else st.just(set())
    stages = data.draw(st.sets(st.sampled_from(graph.backward_ops), max_size=2))
    later = {p: data.draw(sets) | (set(graph.ops[p].reads) & set(names)) for p in sorted(stages)}
    schedule = lazy_schedule(graph, data.draw(sets), later)
    simulator = Simulator(graph)
    run = simulator.run(schedule.steps)
    once = {name for op in graph.ops if not op.recomputable for name in op.writes}
    for p, available in later.items():
        t = schedule.steps.index(p)
        alive = {simulator.names[v] for v in run.value[(run.start < t) & (run.end > t)].tolist()}
        event(f"alive: {bool(alive & set(names))}")
        assert alive & set(names) <= available | once


def test_a_step_that_fits_is_bounded_by_itself() -> None:
    graph = graphs.diamond()
    search = certified(graph, 10**6)
    assert search.bound_ns == sum(op.cost_ns for op in graph.ops)
    assert not search.said, "there is nowhere to cut"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rules_only_ever_cost(data: st.DataObject) -> None:
    """The exhaustive search under its rules: fewer schedules, never a cheaper one, and every one as it says."""
    graph = data.draw(training_graphs(max_forward=4))
    budget_bytes = data.draw(budgets(graph))
    rules = Rules(times=1, in_forward=False, backward_ops=False)
    free, bound_by_rules = exhaustive(graph, budget_bytes), exhaustive(graph, budget_bytes, rules)
    if bound_by_rules is None:
        return
    assert free is not None
    timeline = simulate(graph, bound_by_rules)
    assert timeline.peak_bytes <= budget_bytes
    assert timeline.time_ns >= simulate(graph, free).time_ns
    again = bound_by_rules.recomputes()
    steps = [bound_by_rules.steps[t] for t in again]
    assert len(set(steps)) == len(steps)
    assert all(t >= timeline.boundary for t in again)
    assert all(i < graph.num_forward_ops and graph.ops[i].recomputable for i in steps)


def test_exhaustive_knows_the_chain() -> None:
    best = exhaustive(graphs.chain(), 23)
    assert best is not None
    assert best.steps == (0, 1, 2, 3, 0, 4, 5)
    assert exhaustive(graphs.chain(), 22) is None
    assert solve(graphs.chain(), 23).schedule == best
