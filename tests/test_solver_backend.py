from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import SolverMissingError
from planner.solver import backend
from planner.solver.backend import Program


def knapsack(prices: list[int], weights: list[int], least: int) -> Program:
    """Buy weight of at least `least` for the least money."""
    program = Program()
    columns = [program.column(float(price), binary=True) for price in prices]
    program.row([(column, -float(weight)) for column, weight in zip(columns, weights, strict=True)], -float(least))
    return program


def by_hand(prices: list[int], weights: list[int], least: int) -> float:
    best = math.inf
    for chosen in range(2 ** len(prices)):
        bought = [i for i in range(len(prices)) if chosen >> i & 1]
        if sum(weights[i] for i in bought) >= least:
            best = min(best, sum(prices[i] for i in bought))
    return best


def without_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)


def without_cbc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "available", lambda self: False)
    monkeypatch.setattr(pulp.COIN_CMD, "available", lambda self: False)


items = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(items, st.integers(0, 40))
def test_highs_finds_the_optimum_or_proves_there_is_none(pairs: list[tuple[int, int]], least: int) -> None:
    prices, weights = [p for p, _ in pairs], [w for _, w in pairs]
    answer = backend.solve(knapsack(prices, weights, least), time_limit_s=10)
    expected = by_hand(prices, weights, least)
    assert answer.status == ("infeasible" if math.isinf(expected) else "optimal")
    assert answer.bound == pytest.approx(expected, abs=1e-5)
    if answer.values:
        assert sum(p * round(v) for p, v in zip(prices, answer.values, strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(items, st.integers(0, 40), st.sampled_from([0.0, 0.5, 3.0]))
def test_relaxing_and_fixing_is_within_the_gap_and_leaves_the_program_as_it_was(pairs, least, gap) -> None:
    prices, weights = [p for p, _ in pairs], [w for _, w in pairs]
    model = backend.Model(knapsack(prices, weights, least))
    answer, expected = model.relax_and_fix(time_limit_s=10, gap=gap), by_hand(prices, weights, least)
    assert answer.status == ("infeasible" if math.isinf(expected) else "optimal")
    assert answer.bound <= expected + 1e-5
    if answer.values:
        assert sum(p * round(v) for p, v in zip(prices, answer.values, strict=True)) <= expected + gap + 1e-5
    again = model.solve(time_limit_s=10)
    assert again.bound == pytest.approx(expected, abs=1e-5)


def test_relaxing_and_fixing_solves_less_than_the_whole_where_it_can(monkeypatch) -> None:
    runs = []
    real = backend.Model.solve
    monkeypatch.setattr(backend.Model, "solve", lambda self, **how: (runs.append(dict(self._fixed)), real(self, **how))[1])
    model = backend.Model(knapsack([3, 1, 1, 9], [3, 5, 5, 2], 11))
    answer = model.relax_and_fix(time_limit_s=10, gap=2.5)
    assert answer.status == "optimal" and [round(v) for v in answer.values] == [1, 1, 1, 0]
    assert runs == [{}, {1: 1, 2: 1, 3: 0}]  # the relaxation buys a third of the first


@pytest.mark.parametrize(
    ("pairs", "least"), [([(3, 4), (2, 3), (9, 9)], 7), ([(5, 5), (5, 5)], 11), ([(1, 1)], 0), ([(4, 7), (3, 5), (2, 3)], 8)]
)
def test_cbc_agrees(pairs: list[tuple[int, int]], least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prices, weights = [p for p, _ in pairs], [w for _, w in pairs]
    without_highs(monkeypatch)
    answer = backend.solve(knapsack(prices, weights, least), time_limit_s=10)
    expected = by_hand(prices, weights, least)
    assert answer.solver == "CBC"
    assert answer.status == ("infeasible" if math.isinf(expected) else "optimal")
    assert answer.bound == pytest.approx(expected)


@pytest.mark.parametrize("use_cbc", [False, True])
def test_the_bound_never_exceeds_the_optimum_whatever_the_gap(use_cbc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_cbc:
        without_highs(monkeypatch)
    prices, weights = [7, 8, 9, 11, 13, 6], [3, 4, 5, 6, 8, 3]
    exact = by_hand(prices, weights, 17)
    for gap in (0.0, 1.0, 5.0, 100.0):
        answer = backend.solve(knapsack(prices, weights, 17), time_limit_s=10, gap=gap)
        assert answer.bound <= exact + 1e-6
        assert sum(p * v for p, v in zip(prices, answer.values, strict=True)) <= exact + gap + 1e-6


@pytest.mark.parametrize("use_cbc", [False, True])
def test_the_linear_relaxation_bounds_from_below(use_cbc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_cbc:
        without_highs(monkeypatch)
    answer = backend.solve(knapsack([4, 3], [4, 2], 5), time_limit_s=10, relax=True)
    assert answer.bound == pytest.approx(5.5)


@pytest.mark.parametrize("use_cbc", [False, True])
def test_a_changed_cost_counts_in_the_next_solve(use_cbc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_cbc:
        without_highs(monkeypatch)
    model = backend.Model(knapsack([4, 3], [4, 4], 4))
    assert model.solve(time_limit_s=10).bound == pytest.approx(3.0)
    model.cost(1, 9.0)
    answer = model.solve(time_limit_s=10)
    assert answer.bound == pytest.approx(4.0) and answer.values == pytest.approx([1.0, 0.0])


def test_the_clock_of_an_integer_program_starts_anew_and_that_of_a_linear_one_runs_on() -> None:
    model = backend.Model(knapsack([4, 3], [4, 2], 5))
    model.solve(time_limit_s=7)
    highs = model._problem.solverModel
    assert highs.getOptionValue("time_limit")[1] == 7
    model.solve(time_limit_s=7)
    assert highs.getOptionValue("time_limit")[1] == 7
    spent = highs.getRunTime()
    model.solve(time_limit_s=7, relax=True)
    assert highs.getOptionValue("time_limit")[1] == pytest.approx(spent + 7)


def test_a_column_may_occur_twice_in_a_row() -> None:
    program = Program()
    x = program.column(-0.0, upper=None)
    y = program.column(1.0, upper=None)
    program.row([(x, 1.0), (x, 1.0)], 6.0)
    program.row([(x, -1.0), (y, -1.0)], -5.0)
    assert backend.solve(program, time_limit_s=10).bound == pytest.approx(2.0)


def test_neither_solver_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_highs(monkeypatch)
    without_cbc(monkeypatch)
    with pytest.raises(SolverMissingError, match="pip install highspy"):
        backend.solve(knapsack([1], [1], 1), time_limit_s=1)


def test_nothing_is_printed_and_a_thread_count_set_by_somebody_else_does_no_harm() -> None:
    """In a fresh process, for the banner comes with the first solve and the thread count is chosen once."""
    code = (
        "from planner.solver.backend import Program, solve\n"
        "program = Program(); c = program.column(1.0, binary=True); program.row([(c, -1.0)], -1.0)\n"
        "assert solve(program, time_limit_s=5).values == (1.0,)\n"
        "import highspy\n"
        "other = highspy.Highs(); other.setOptionValue('output_flag', False)\n"
        "highspy.Highs.resetGlobalScheduler(True); other.setOptionValue('threads', 2)\n"
        "other.addCol(1.0, 1.0, 3.0, 0, [], []); other.run()\n"
        "assert solve(program, time_limit_s=5).status == 'optimal'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "")


def test_cbc_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    without_highs(monkeypatch)
    folder = tmp_path_factory.mktemp("cbc")
    monkeypatch.chdir(folder)
    assert backend.solve(knapsack([1, 2], [1, 2], 2), time_limit_s=5).status == "optimal"
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
