from __future__ import annotations

import math
import time

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load, resident_bytes
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import Simulator, simulate
from planner.solver.bound import Bounds, lower_bound
from planner.solver.exhaustive import Rules, exhaustive
from planner.solver.floor import floor
from planner.solver.lazy import lazy_schedule
from planner.solver.local_search import LocalSearch
from planner.solver.solve import solve
from tests import graphs
from tests.strategies import budgets, training_graphs
from tests.test_solver_backend import without_highs


def optimum(graph: Graph, budget_bytes: int) -> float:
    """Over every valid schedule in the captured order of first runs."""
    best = exhaustive(graph, budget_bytes)
    return math.inf if best is None else simulate(graph, best).time_ns


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_one_cut_anywhere_is_a_bound(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    cut = data.draw(st.sampled_from(range(len(graph.ops))))
    plain = sum(op.cost_ns for op in graph.ops)
    extra = Bounds(graph).extra(budget_bytes, (cut,), time_limit_s=10, gap=0.0, relax=False)
    event(f"bites: {extra > 0}")
    assert plain * (1 + extra) <= optimum(graph, budget_bytes) + 1e-3


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_several_cuts_are_a_bound_and_no_weaker_than_one(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    cuts = sorted(data.draw(st.sets(st.sampled_from(range(len(graph.ops))), min_size=2, max_size=3)))
    plain = sum(op.cost_ns for op in graph.ops)
    several = Bounds(graph).extra(budget_bytes, tuple(cuts), time_limit_s=10, gap=0.0, relax=False)
    last = Bounds(graph).extra(budget_bytes, tuple(cuts[-1:]), time_limit_s=10, gap=0.0, relax=False)
    event(f"bites: {several > 0}")
    event(f"stronger: {several > last + 1e-9}")
    assert several >= last - 1e-6
    assert plain * (1 + several) <= optimum(graph, budget_bytes) + 1e-3


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_bound_holds_with_and_without_time(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    best = optimum(graph, budget_bytes)
    plain = sum(op.cost_ns for op in graph.ops)
    for seconds in (0.0, 10.0):
        effort = data.draw(st.sampled_from(("linear", "exact", "thorough")))
        found = lower_bound(graph, budget_bytes, effort=effort, time_limit_s=seconds)
        assert plain <= found <= best or (math.isinf(best) and found >= plain)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_budget_after_budget_the_bounds_hold_and_never_rise(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    bounds, found = Bounds(graph), {}
    for budget_bytes in data.draw(st.lists(budgets(graph), min_size=2, max_size=4)):
        found[budget_bytes] = bounds.lower_bound(budget_bytes, effort=data.draw(st.sampled_from(("linear", "thorough"))))
        assert found[budget_bytes] <= optimum(graph, budget_bytes) or math.isinf(optimum(graph, budget_bytes))
    event(f"bites: {max(found.values()) > sum(op.cost_ns for op in graph.ops)}")


@pytest.mark.parametrize("name", ["chain", "two_outputs", "statistics", "dropout"])
@pytest.mark.parametrize("use_cbc", [False, True])
def test_the_bound_meets_the_optimum_where_the_first_stages_are_tight(
    name: str, use_cbc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use_cbc:
        without_highs(monkeypatch)
    graph = graphs.SMALL[name]()
    peak = simulate(graph, keep_all(graph)).peak_bytes
    best, plain = optimum(graph, peak - 1), sum(op.cost_ns for op in graph.ops)
    assert plain < lower_bound(graph, peak - 1) == best


def test_the_cuts_that_are_ranked_first_are_about_the_best_of_all() -> None:
    graph = load("unet-4", gradients=False)
    bounds, plain = Bounds(graph), simulate(graph, keep_all(graph)).peak_bytes
    for budget_bytes in (plain // 2, plain * 4 // 5):
        found = {
            cut: bounds.extra(budget_bytes, (cut,), time_limit_s=10, gap=0.0, relax=True)
            for cut in bounds.cuts.ranked(budget_bytes)
        }
        assert max(found[cut] for cut in bounds.cuts.ranked(budget_bytes)[:3]) >= 0.97 * max(found.values()) > 0
        assert min(found.values()) < 0.5 * max(found.values())


def test_cuts_at_the_hottest_ops_raise_a_bound_near_the_floor() -> None:
    graph = load("resnet50", gradients=False)
    budget_bytes = floor(graph)[0] * 107 // 100
    plain = sum(op.cost_ns for op in graph.ops)
    bounds = Bounds(graph)
    exact = bounds.lower_bound(budget_bytes, effort="exact", time_limit_s=20)
    thorough = bounds.lower_bound(budget_bytes, effort="thorough", time_limit_s=20)
    assert (thorough - plain) > 1.2 * (exact - plain) > 0
    schedule = bounds.hinted
    assert schedule is not None
    assert simulate(graph, schedule).time_ns >= thorough * 0.99


def test_rounds_of_the_certificate_meet_the_plan_they_hint_at() -> None:
    """Each cuts where the last schedule broke the budget, until bound and schedule are two tenths of a percent apart."""
    graph = load("unet-4", gradients=False)
    plain = simulate(graph, keep_all(graph))
    budget_bytes = resident_bytes(graph) + (plain.peak_bytes - resident_bytes(graph)) * 45 // 100
    bounds, search = Bounds(graph), LocalSearch(graph, budget_bytes)
    found, best = [bounds.lower_bound(budget_bytes, effort="exact", time_limit_s=20)], math.inf
    while best - found[-1] > 0.002 * plain.time_ns:
        more = bounds.refine(budget_bytes, time_limit_s=60)
        found.append(bounds.known_ns(budget_bytes))
        assert bounds.hinted is not None
        steps = search.repair(list(bounds.hinted.steps), time.monotonic() + 60)
        if steps is not None:
            best = min(best, search.time_ns(search.shrink(steps, time.monotonic() + 60)))
        assert more or best - found[-1] <= 0.002 * plain.time_ns
    assert found == sorted(found) and found[-1] <= best
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
    assert lower_bound(graph, 10**6) == sum(op.cost_ns for op in graph.ops)


def test_a_bound_that_is_enough_ends_the_search() -> None:
    graph = graphs.chain()
    plain = sum(op.cost_ns for op in graph.ops)
    assert plain <= lower_bound(graph, 23, enough_ns=plain) <= lower_bound(graph, 23) <= plain + 5


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
