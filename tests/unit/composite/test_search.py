"""A point for each unit: what the bound is of, what the search spends, and which steps it runs."""

from collections import Counter
from types import SimpleNamespace

import pytest
from torch import nn

from planner.composite import search as under_test
from planner.composite.search import UnitSearch
from planner.errors import NoScheduleFoundError
from planner.limits import Limits, Spending
from planner.solver.unit_choice import choose
from tests.support.unit_graphs import block, whole

NAMES = [f"blocks.{k}" for k in range(3)]
LIMITS = Limits(1.0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in NAMES)


def search(peak=lambda made, varies=False: 0, limits=LIMITS):
    """Of hand-drawn blocks; `peak(schedules)` is what a step measures."""
    kind = SimpleNamespace(graph=block(), members=NAMES, made=lambda schedule, is_compiled: schedule)
    return UnitSearch(
        SimpleNamespace(model=Model(), peak=peak, submodules=SimpleNamespace(counts=Counter(NAMES))), [kind], limits, whole(3)
    )


def test_the_bound_is_that_of_the_budget_even_where_a_choice_for_less_is_taken(monkeypatch):
    found = search()
    plain = found.predicted_bytes(dict.fromkeys(NAMES, 0))
    of_budget = choose(found.sections, found.fronts, plain, found.composed.graph.plain_ns)
    assert of_budget.bound_ns == 0
    predicted = found.predicted_bytes
    monkeypatch.setattr(found, "predicted_bytes", lambda choice: predicted(choice) + 4)
    chosen = found.within(plain)
    assert sum(found.fronts[unit][at].time_ns for unit, at in chosen.points.items()) > 0 == chosen.bound_ns


def test_all_calls_of_the_solver_spend_the_limits_together(monkeypatch):
    taken, limits = [], Limits(2.0, 40.0)

    def recording(function, at):
        def run(*args, **options):
            taken.append(args[at])
            return function(*args, **options)

        return run

    for name, at in (("front", 1), ("choose", 4), ("lowest", 2)):
        monkeypatch.setattr(under_test, name, recording(getattr(under_test, name), at))
    monkeypatch.setattr(Spending, "give_back", lambda *_: None)  # as if each had spent what it could
    found = search(lambda made, varies=False: None, limits)
    with pytest.raises(NoScheduleFoundError):
        found.within(found.predicted_bytes(dict.fromkeys(NAMES, 0)))
    assert len(taken) > 3
    assert sum(each.effort for each in taken) < 2.0 and sum(each.time_limit_s for each in taken) < 40.0


@pytest.mark.parametrize("measured", [None, 10**6])
def test_no_step_runs_twice(measured):
    steps = []

    def peak(made, varies=False):
        steps.append(tuple(made.items()))
        return measured

    found = search(peak)
    for budget in (found.predicted_bytes(dict.fromkeys(NAMES, 0)), found.predicted_bytes(found.lowest)):
        with pytest.raises(NoScheduleFoundError):
            found.within(budget)
    assert steps and len(steps) == len(set(steps))
