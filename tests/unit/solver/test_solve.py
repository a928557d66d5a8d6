"""What `solve` promises: it fits, it is the best of its class, nothing beats its bound, and it refuses only with a proof."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load
from planner.errors import InfeasibleBudgetError, NoScheduleFoundError, SolverMissingError
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline, simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.baselines import all_baselines
from planner.solver.lazy import lazy_schedule
from planner.solver.lifetimes import lifetimes
from planner.solver.search import Archive
from planner.solver.solve import Solver, floor, lowest_peak, solve
from tests.support import graphs
from tests.support.drawn_graphs import DRAWN
from tests.support.exhaustive import Rules, exhaustive
from tests.support.solvers import without_highs
from tests.support.strategies import budgets, training_graphs

EXACT = 1e-6
SMALL = [pytest.param(make(), id=name) for name, make in graphs.SMALL.items()]


def attempt(graph: Graph, budget_bytes: int) -> Solution | None:
    """The exact solution in captured order, or None; asserts that a refusal is true and that what is returned fits."""
    try:
        solution = Solver(graph, reorder=False).solve(budget_bytes, gap=EXACT)
    except InfeasibleBudgetError as error:
        assert error.floor_bytes > budget_bytes == error.budget_bytes
        return None
    except NoScheduleFoundError:
        return None
    assert simulate(graph, solution.schedule).peak_bytes <= budget_bytes
    return solution


def kept_sets(graph: Graph) -> Iterator[Timeline]:
    """Every set of values that are kept until their last use; every other value is recomputed right before its first need and
    then kept until its last use."""
    names = lifetimes(graph).names
    for count in range(len(names) + 1):
        for kept in combinations(names, count):
            yield simulate(graph, lazy_schedule(graph, kept))


def cheapest_kept_set(graph: Graph, budget_bytes: int) -> float:
    fitting = (timeline.time_ns for timeline in kept_sets(graph) if timeline.peak_bytes <= budget_bytes)
    return min(fitting, default=math.inf)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_no_kept_set_that_fits_is_cheaper_than_the_plan(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(min_forward=5, max_forward=7))
    budget_bytes = data.draw(budgets(graph))
    assume(floor(graph)[0] <= budget_bytes)
    best, solution = cheapest_kept_set(graph, budget_bytes), attempt(graph, budget_bytes)
    found = math.inf if solution is None else simulate(graph, solution.schedule).time_ns
    event(f"recompute happens: {solution is not None and bool(solution.schedule.recomputes())}")
    event(f"better than every kept set: {found < best}")
    assert found <= best


@pytest.mark.parametrize("why", DRAWN)
def test_what_local_search_cannot_reach_is_found_by_an_exchange(why: str) -> None:
    """Hypothesis drew these."""
    make, budget_bytes, least_ns = DRAWN[why]
    graph = make()
    solution = attempt(graph, budget_bytes)
    assert solution is not None
    assert simulate(graph, solution.schedule).time_ns <= least_ns == cheapest_kept_set(graph, budget_bytes)


def test_the_true_optimum_is_found_nineteen_times_in_twenty() -> None:
    """Counted, because search proves nothing: of every valid schedule that runs no backward op again, as no plan does.

    The same graphs each time: hypothesis draws a rare miss, about one in a thousand, again and again with small changes.
    """
    counts: Counter[bool] = Counter()

    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(st.data())
    def attempts(data: st.DataObject) -> None:
        graph = data.draw(training_graphs(max_forward=5))
        budget_bytes = data.draw(budgets(graph))
        best = exhaustive(graph, budget_bytes, Rules(backward_ops=False))
        assume(best is not None)
        assert best is not None
        optimum, solution = simulate(graph, best).time_ns, attempt(graph, budget_bytes)
        found = math.inf if solution is None else simulate(graph, solution.schedule).time_ns
        assert found >= optimum
        counts[found == optimum] += 1

    attempts()
    assert counts[True] >= 19 * counts[False]
    assert counts[True] >= 75


raise_bound = Archive.raise_bound


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_no_schedule_at_all_beats_the_bound(data: st.DataObject) -> None:
    """Exhaustive search knows no class: any op any number of times, backward ops too, recomputes within the forward."""
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    best = exhaustive(graph, budget_bytes)
    said: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:  # the archive refuses a bound that a schedule at hand contradicts
        patch.setattr(
            Archive, "raise_bound", lambda self, budget, ns: (said.append((budget, ns)), raise_bound(self, budget, ns))
        )
        solution = attempt(graph, budget_bytes)
    bounds: dict[int, int] = {}
    for budget, ns in said:  # some are of smaller budgets
        bounds[budget] = max(ns, bounds.get(budget, 0))
    for budget, ns in bounds.items():
        cheapest = best if budget == budget_bytes else exhaustive(graph, budget)
        assert cheapest is None or ns <= simulate(graph, cheapest).time_ns
    if best is None:
        assert solution is None
        return
    assume(solution is not None)
    assert solution is not None
    optimum = simulate(graph, best)
    found = simulate(graph, solution.schedule)
    assert optimum.peak_bytes <= budget_bytes
    assert solution.bound_ns <= optimum.time_ns <= found.time_ns
    event(f"equal to the true optimum: {found.time_ns == optimum.time_ns}")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("graph", SMALL)
def test_every_budget_of_the_small_graphs(graph: Graph) -> None:
    plain = simulate(graph, keep_all(graph))
    least, costs = floor(graph)[0], []
    for budget_bytes in range(max(1, least - 2), plain.peak_bytes + 2):
        solution = attempt(graph, budget_bytes)
        best = exhaustive(graph, budget_bytes, Rules(backward_ops=False))
        assert (solution is None) == (best is None)
        if solution is None or best is None:
            continue
        time_ns = simulate(graph, solution.schedule).time_ns
        assert time_ns == simulate(graph, best).time_ns
        costs.append(time_ns)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == plain.time_ns
    assert costs[0] > plain.time_ns


@settings(deadline=None, max_examples=3)
@given(st.data())
def test_cost_never_rises_with_the_budget(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    least, plain = floor(graph)[0], simulate(graph, keep_all(graph))
    previous = None
    for budget_bytes in [*range(max(1, least), plain.peak_bytes, max(1, (plain.peak_bytes - least) // 5)), plain.peak_bytes]:
        solution = attempt(graph, budget_bytes)
        if solution is None:
            assert previous is None, "a plan was found at a smaller budget"
            continue
        time_ns = simulate(graph, solution.schedule).time_ns
        assert previous is None or time_ns <= previous
        previous = time_ns
    assert previous == plain.time_ns


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_baseline_is_cheaper_than_the_plan_or_the_bound(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    name, schedule = data.draw(st.sampled_from([*all_baselines(graph, data.draw(budgets(graph)))]))
    budget_bytes = simulate(graph, schedule).peak_bytes
    event(name)
    solution = attempt(graph, budget_bytes)
    assert solution is not None, f"{name} fits and no plan was found"
    timelines = [simulate(graph, other) for _, other in (("drawn", schedule), *all_baselines(graph, budget_bytes))]
    for timeline in timelines:
        if timeline.peak_bytes <= budget_bytes:  # as that of the one that was drawn
            assert timeline.time_ns >= simulate(graph, solution.schedule).time_ns >= solution.bound_ns


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_floor_is_true(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    least, worst = floor(graph)
    assert exhaustive(graph, least - 1) is None
    with pytest.raises(InfeasibleBudgetError, match=graph.ops[worst].name) as raised:
        Solver(graph, reorder=False).solve(least - 1)
    assert raised.value.floor_bytes == least


def test_infeasible_says_which_op_holds_what_and_what_to_do() -> None:
    graph = graphs.skip()
    big = replace(
        graph,
        values=tuple(replace(v, nbytes=v.nbytes * 2**30) for v in graph.values),
        ops=tuple(replace(op, source=f"model.py:{n}") for n, op in enumerate(graph.ops)),
    )
    with pytest.raises(InfeasibleBudgetError) as raised:
        solve(big, 10 * 2**30)
    assert str(raised.value) == (
        "Raise the budget to 24.00 GiB: budget 10.00 GiB is below 24.00 GiB, the least any schedule of this graph can reach "
        "(op b3, model.py:4, holds 24.00 GiB while it runs: a 9.00 GiB, n 6.00 GiB, gn 2.00 GiB, gs 2.00 GiB, 5.00 GiB of "
        "parameters, gradients and others). Or reduce the batch (half of it needs about 14.50 GiB)"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpt2-medium-fused", "compute the loss in chunks of tokens"),
        ("gpt2-medium-fused", "(the next to hold most, pow_48, needs 3.26 GiB)"),
        ("resnet50", "use a convolution algorithm with less workspace"),
        ("llama-32", "use fewer bytes a parameter"),
    ],
)
def test_infeasible_says_what_would_lower_the_floor(name: str, advice: str) -> None:
    graph = load(name)
    with pytest.raises(InfeasibleBudgetError) as raised:
        solve(graph, 2**20)
    assert advice in str(raised.value)
    assert "reduce the batch (half of it needs about" in str(raised.value)
    assert raised.value.floor_bytes == Solver(graph).floor_bytes


def test_scores_of_attention_at_the_floor_call_for_a_fused_kernel() -> None:
    graph = graphs.skip()
    _, worst = floor(graph)
    ops = tuple(replace(op, name="_softmax_backward_data") if i == worst else op for i, op in enumerate(graph.ops))
    with pytest.raises(InfeasibleBudgetError, match="use fused attention"):
        solve(replace(graph, ops=ops), 1)


def names_a_budget_that_works(graph: Graph, budget_bytes: int, limits: Limits) -> None:
    with pytest.raises(NoScheduleFoundError, match="not proven") as raised:
        solve(graph, budget_bytes, limits, reorder=False)
    lowest = raised.value.lowest_bytes
    assert lowest is not None and lowest > budget_bytes and f"({lowest} bytes)" in str(raised.value)
    assert simulate(graph, solve(graph, lowest, limits, reorder=False).schedule).peak_bytes <= lowest


@pytest.mark.parametrize("graph", SMALL)
def test_not_found_without_any_effort_names_a_budget_that_works(graph: Graph) -> None:
    names_a_budget_that_works(graph, floor(graph)[0], Limits(effort=0.0))


def test_not_found_after_a_whole_search_names_a_budget_that_works() -> None:
    names_a_budget_that_works(graphs.dropout(), 26, Limits())


@settings(deadline=None, max_examples=3)
@given(st.data())
def test_the_lowest_peak_can_be_met(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    lowest = Solver(graph, reorder=False).lowest_peak()
    assert lowest >= floor(graph)[0]
    assert attempt(graph, lowest) is not None
    assert Solver(graph).lowest_peak() <= lowest
    assert lowest <= min(timeline.peak_bytes for timeline in kept_sets(graph)) + 1


def test_a_budget_that_fits_everything_is_the_plain_step() -> None:
    graph = graphs.diamond()
    plain = simulate(graph, keep_all(graph))
    solution = solve(graph, plain.peak_bytes)
    assert solution.schedule == keep_all(graph)
    assert (solution.status, solution.bound_ns) == ("optimal", plain.time_ns)
    assert solution.solver.startswith("keep all")


def test_the_chain_recomputes_its_first_layer() -> None:
    solution = solve(graphs.chain(), 23)
    assert solution.schedule == Schedule((0, 1, 2, 3, 0, 4, 5))
    assert solution.status == "optimal"


def test_the_random_state_is_kept_and_the_mask_drawn_again() -> None:
    graph = graphs.dropout()
    solution = solve(graph, 27)
    timeline = simulate(graph, solution.schedule)
    assert 2 in [solution.schedule.steps[t] for t in solution.schedule.recomputes()]
    assert "seed" in timeline.saved
    assert "mask" not in timeline.saved


def test_the_large_output_of_a_normalisation_is_recomputed() -> None:
    graph = graphs.statistics()
    solution = solve(graph, 27)
    assert solution.schedule.steps == (0, 1, 2, 3, 4, 1, 5, 6, 7)
    assert simulate(graph, solution.schedule).saved == ("a", "loss", "z")


def test_a_skip_is_dropped_between_its_two_ends() -> None:
    """The first value of a U is wanted at both ends. Dropped in between it fits 26 bytes, which keeping sets cannot do."""
    graph = graphs.skip()
    assert cheapest_kept_set(graph, 26) == math.inf
    solution = solve(graph, 26)
    assert 0 in [solution.schedule.steps[t] for t in solution.schedule.recomputes()]


def test_a_small_graph_that_is_planned_as_a_large_one_meets_its_lowest_peak() -> None:
    for make in graphs.SMALL.values():
        graph = make()
        lowest = lowest_peak(graph)
        best = exhaustive(graph, lowest, Rules(backward_ops=False))
        assert best is not None
        solution = solve(graph, lowest, gap=EXACT)
        assert simulate(graph, solution.schedule).time_ns == simulate(graph, best).time_ns
        assert solution.bound_ns <= simulate(graph, best).time_ns


def test_without_a_solver_planning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_highs(monkeypatch)
    with pytest.raises(SolverMissingError):
        solve(graphs.chain(), 23)
