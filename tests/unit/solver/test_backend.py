from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.errors import SolverMissingError
from planner.solver import backend
from planner.solver.backend import Model, Program
from planner.solver.work import Meter, Work
from tests.support.solvers import without_highs


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


def hard(columns: int = 30, rows: int = 5) -> Program:
    """Several knapsacks at once, of which prices say next to nothing: hundreds of nodes."""
    chance = random.Random(7)
    program = Program()
    for _ in range(columns):
        program.column(chance.randint(50, 60), binary=True)
    for _ in range(rows):
        weights = [chance.randint(20, 99) for _ in range(columns)]
        program.row([(i, -float(weight)) for i, weight in enumerate(weights)], -sum(weights) / 2)
    return program


items = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(items, st.integers(0, 40))
def test_highs_finds_the_optimum_or_proves_there_is_none(pairs: list[tuple[int, int]], least: int) -> None:
    prices, weights = [p for p, _ in pairs], [w for _, w in pairs]
    answer = backend.solve(knapsack(prices, weights, least), Work())
    expected = by_hand(prices, weights, least)
    assert answer.status == ("infeasible" if math.isinf(expected) else "optimal")
    assert answer.bound == pytest.approx(expected, abs=1e-5)
    assert bool(answer.values) == math.isfinite(expected)
    if answer.values:
        assert sum(p * round(v) for p, v in zip(prices, answer.values, strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(items, st.integers(0, 40), st.sampled_from([0.0, 0.5, 3.0]))
def test_relaxing_and_fixing_is_within_the_gap_and_leaves_the_program_as_it_was(pairs, least, gap) -> None:
    prices, weights = [p for p, _ in pairs], [w for _, w in pairs]
    model = Model(knapsack(prices, weights, least))
    answer, expected = model.relax_and_fix(Work(), gap=gap), by_hand(prices, weights, least)
    assert answer.status == ("infeasible" if math.isinf(expected) else "optimal")
    assert answer.bound <= expected + 1e-5
    assert bool(answer.values) == math.isfinite(expected)
    if answer.values:
        assert sum(p * round(v) for p, v in zip(prices, answer.values, strict=True)) <= expected + gap + 1e-5
    again = model.solve(Work())
    assert again.bound == pytest.approx(expected, abs=1e-5)


def test_relaxing_and_fixing_takes_less_work_than_the_whole_where_a_gap_allows_it() -> None:
    fixed, whole = Work(), Work()
    answer, best = Model(hard()).relax_and_fix(fixed, gap=30.0), backend.solve(hard(), whole, gap=0.0)
    assert answer.status == best.status == "optimal"
    assert answer.bound <= best.bound <= answer.objective <= answer.bound + 30.0
    assert fixed.meter.spent < 0.2 * whole.meter.spent


def test_the_bound_never_exceeds_the_optimum_whatever_the_gap() -> None:
    prices, weights = [7, 8, 9, 11, 13, 6], [3, 4, 5, 6, 8, 3]
    exact = by_hand(prices, weights, 17)
    for gap in (0.0, 1.0, 5.0, 100.0):
        answer = backend.solve(knapsack(prices, weights, 17), Work(), gap=gap)
        assert answer.bound <= exact + 1e-6
        assert sum(p * v for p, v in zip(prices, answer.values, strict=True)) <= exact + gap + 1e-6


def test_the_linear_relaxation_bounds_from_below() -> None:
    answer = backend.solve(knapsack([4, 3], [4, 2], 5), Work(), relax=True)
    assert answer.bound == pytest.approx(5.5)


def test_a_changed_cost_counts_in_the_next_solve() -> None:
    model = Model(knapsack([4, 3], [4, 4], 4))
    assert model.solve(Work()).bound == pytest.approx(3.0)
    model.cost(1, 9.0)
    answer = model.solve(Work())
    assert answer.bound == pytest.approx(4.0) and answer.values == pytest.approx([1.0, 0.0])


class Changes:
    """Draws changes of a program and makes them, each in the way of the live model."""

    def __init__(self, draw: Any, model: Model) -> None:
        self.draw, self.model, self.program = draw, model, model.program
        self.all = (self.column, self.row, self.upper, self.cost)

    def some(self) -> None:
        for change in self.draw(st.lists(st.sampled_from(self.all), max_size=4)):
            change()

    def a_column(self) -> int:
        return self.draw(st.integers(0, len(self.program.costs) - 1))

    def column(self) -> None:
        binary = self.draw(st.booleans())
        upper = 1.0 if binary else self.draw(st.sampled_from((1.0, 2.5, math.inf)))
        self.program.column(self.draw(st.integers(0, 6)), upper=upper, binary=binary)

    def row(self) -> None:
        factors = st.integers(-5, 5)
        pairs = [(self.a_column(), float(self.draw(factors))) for _ in range(self.draw(st.integers(1, 4)))]
        self.program.row(pairs, self.draw(st.sampled_from((-3.0, -1.0, 0.0, 2.0, 6.0))))

    def upper(self) -> None:
        column = self.a_column()
        self.model.upper(column, 1.0 if self.program.binary[column] else self.draw(st.sampled_from((0.0, 1.0, 2.0, math.inf))))

    def cost(self) -> None:
        self.model.cost(self.a_column(), self.draw(st.integers(0, 6)))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_program_that_grew_and_changed_in_place_is_the_same_as_one_built_anew(data: st.DataObject) -> None:
    program = Program()
    for _ in range(data.draw(st.integers(1, 4))):
        program.column(data.draw(st.integers(0, 6)), binary=data.draw(st.booleans()))
    model = Model(program)
    changes = Changes(data.draw, model)
    statuses = []
    for _ in range(data.draw(st.integers(2, 5))):
        changes.some()
        relax = data.draw(st.booleans())
        solve = data.draw(st.sampled_from(("solve", "relax_and_fix")))
        here = model.solve(Work(), relax=relax) if solve == "solve" else model.relax_and_fix(Work())
        anew = backend.solve(deepcopy(program), Work(), relax=relax and solve == "solve")
        statuses.append(here.status)
        assert here.status == anew.status
        assert here.bound == pytest.approx(anew.bound, abs=1e-5)
        assert bool(here.values) == (here.status == "optimal")
        if here.values:
            cost = sum(cost * value for cost, value in zip(program.costs, here.values, strict=True))
            assert cost == pytest.approx(here.objective, abs=1e-5) and cost == pytest.approx(anew.bound, abs=1e-5)
            for pairs, limit in program.rows:
                assert sum(factor * here.values[i] for i, factor in pairs) <= limit + 1e-5
    event(f"solved after changes: {statuses[1:].count('optimal')}, infeasible: {statuses.count('infeasible')}")


def test_an_integer_program_cut_short_has_a_valid_bound_and_goes_on_to_the_optimum() -> None:
    exact = backend.solve(hard(), Work())
    assert exact.status == "optimal"
    model, bounds, answer = Model(hard()), [], None
    units = 1e-4
    while answer is None or answer.status != "optimal":
        work = Work(units)
        answer = model.solve(work)
        bounds.append(answer.bound)
        assert answer.bound <= exact.bound + 1e-5
        if answer.values:
            assert answer.objective >= exact.bound - 1e-5
        units *= 2
    assert len(bounds) >= 4, "it was never cut short"
    assert answer.values and answer.objective <= answer.bound + 1e-5
    assert bounds[-1] == pytest.approx(exact.bound, abs=1e-5)


def test_a_cut_short_integer_program_spends_about_what_it_may_and_the_next_as_much_as_it_needs() -> None:
    whole, once, model = Work(), Work(0.02), Model(hard())
    backend.solve(hard(), whole)
    model.solve(once)
    assert once.is_over and once.meter.spent < 0.02 + 0.1 * whole.meter.spent
    assert model.solve(Work()).status == "optimal"


def test_a_linear_program_cut_short_proves_nothing_and_goes_on_to_the_optimum() -> None:
    exact, model = backend.solve(hard(200, 60), Work(), relax=True), Model(hard(200, 60))
    short = model.solve(Work(0.0), relax=True)
    assert (short.status, short.values, short.bound) == ("unknown", (), -math.inf)
    assert model.solve(Work(), relax=True).bound == pytest.approx(exact.bound)


@pytest.mark.parametrize("units", [math.inf, 0.05])
@pytest.mark.parametrize("relax", [False, True])
def test_the_same_program_gives_the_same_answer_for_the_same_work(units: float, relax: bool) -> None:
    works = [Work(units), Work(units)]
    first, second = (backend.solve(hard(), work, relax=relax) for work in works)
    assert first == second
    assert works[0].meter.spent == works[1].meter.spent > 0
    assert relax or works[0].meter.spent > 0.9 * min(units, 0.05), "too little to say much"


def test_a_run_that_is_given_a_backstop_ends_whatever_ran_before_and_none_is_ended_by_the_time_of_earlier_ones() -> None:
    model = Model(hard())
    assert model.solve(Work(meter=Meter(time.monotonic() + 600))).status == "optimal"
    for relax in (True, False, True):
        late = Work(meter=Meter(time.monotonic() - 1))
        assert relax or model.solve(late).status in ("feasible", "unknown")
        assert model.solve(Work(meter=Meter(time.monotonic() + 600)), relax=relax).status == "optimal"


def test_a_backstop_that_has_passed_leaves_a_valid_bound() -> None:
    exact, late = backend.solve(hard(), Work()), Work(meter=Meter(time.monotonic() - 1))
    assert backend.solve(hard(), late).bound <= exact.bound + 1e-5
    assert late.meter.is_late and late.is_over


def test_a_column_may_occur_twice_in_a_row() -> None:
    program = Program()
    x = program.column(-0.0, upper=math.inf)
    y = program.column(1.0, upper=math.inf)
    program.row([(x, 1.0), (x, 1.0)], 6.0)
    program.row([(x, -1.0), (y, -1.0)], -5.0)
    model = Model(program)
    assert model.solve(Work()).bound == pytest.approx(2.0)
    program.row([(x, 1.0), (x, 1.0)], 2.0)
    assert model.solve(Work()).bound == pytest.approx(4.0)


def test_no_solver_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without_highs(monkeypatch)
    with pytest.raises(SolverMissingError, match="pip install highspy"):
        backend.solve(knapsack([1], [1], 1), Work())


def test_nothing_is_printed_and_a_thread_count_set_by_somebody_else_does_no_harm() -> None:
    """In a fresh process, for the banner comes with the first solve and the thread count is chosen once."""
    code = (
        "from planner.solver.backend import Program, solve\n"
        "from planner.solver.work import Work\n"
        "program = Program(); c = program.column(1.0, binary=True); program.row([(c, -1.0)], -1.0)\n"
        "assert solve(program, Work()).values == (1.0,)\n"
        "import highspy\n"
        "other = highspy.Highs(); other.setOptionValue('output_flag', False)\n"
        "highspy.Highs.resetGlobalScheduler(True); other.setOptionValue('threads', 2)\n"
        "other.addCol(1.0, 1.0, 3.0, 0, [], []); other.run()\n"
        "assert solve(program, Work()).status == 'optimal'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "")
