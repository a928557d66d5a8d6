"""Programs with several cuts, their intervals tied together or not."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import Case
from planner.graph.graph import Graph
from planner.solver.backend import SCALE
from planner.solver.certificate import Certificate
from planner.solver.relaxation import Relaxation
from planner.solver.work import Work
from tests.support.solvers import optimum
from tests.support.strategies import budgets, training_graphs


def bound_ns(program: Relaxation, graph: Graph, budget_bytes: int, *, relax: bool) -> float:
    program.model.upper(program.budget, float(budget_bytes))
    return graph.plain_ns * (1 + program.model.solve(Work(), relax=relax).bound / SCALE)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_tied_intervals_are_a_bound_no_weaker_than_untied_ones_or_the_first_cut(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    cuts = sorted(data.draw(st.sets(st.sampled_from(range(len(graph.ops))), min_size=2, max_size=3)))
    program = Relaxation(graph, cuts, 1.0)
    first = bound_ns(Relaxation(graph, cuts[:1], 1.0), graph, budget_bytes, relax=True)
    untied, whole = (bound_ns(program, graph, budget_bytes, relax=relax) for relax in (True, False))
    assert not program.is_tied
    program.tie()
    assert program.is_tied
    tied, tied_whole = (bound_ns(program, graph, budget_bytes, relax=relax) for relax in (True, False))
    event(f"stronger: {tied > untied + 1e-6}")
    assert max(first, untied) - 1e-3 <= tied <= optimum(graph, budget_bytes) + 1e-3
    assert tied_whole == pytest.approx(whole, abs=1e-3), "in integers they say the same"


def test_a_program_that_says_less_than_fewer_cuts_is_tied() -> None:
    case = Case("resnet50", gradients=True)
    budget, certificate = case.budget(0.3), Certificate(case.graph)
    best = certificate.cuts.ranked(budget)[0]
    one = certificate.bound(budget, (best,), Work(), relax=True).time_ns
    cuts = certificate.next_cuts(budget, (best,), certificate.bound(budget, (best,), Work(), relax=True).candidate)
    assert len(cuts) > 1
    untied = Certificate(case.graph).bound(budget, cuts, Work(), relax=True).time_ns
    tied = certificate.bound(budget, cuts, Work(), relax=True, known_ns=one).time_ns
    assert untied < one <= tied
