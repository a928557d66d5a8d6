"""A refusal in the user's terms: the budget that it names works when typed, as bytes, as text and as a fraction."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.analysis.budgets import restated
from planner.errors import InfeasibleBudgetError
from planner.units import parse_budget


def refusal(floor_bytes: int, plain_bytes: int | None) -> str:
    error = InfeasibleBudgetError("", budget_bytes=1, floor_bytes=floor_bytes)
    return str(restated(error, "0.1", 1, lambda budget: budget // 100, None, plain_bytes))


@given(st.integers(1, 2**40), st.integers(0, 2**40))
def test_what_it_names_is_enough(floor_bytes, more):
    plain_bytes = 2 * floor_bytes + more
    text = refusal(floor_bytes, plain_bytes)
    size, exact, fraction = re.match(
        r"Raise the budget to (.*?) \((\d+) bytes\), (\S+) of the plain step's peak: ", text
    ).groups()
    for named in (size, int(exact), float(fraction)):
        budget = parse_budget(named, plain_bytes)
        assert budget - budget // 100 >= floor_bytes
    assert float(fraction) <= floor_bytes / plain_bytes * 1.02 + 0.001 + 2 / plain_bytes


@pytest.mark.parametrize("plain_bytes", [None, 900])
def test_no_fraction_where_none_was_asked_for_or_none_is_enough(plain_bytes):
    assert "plain step" not in refusal(1000, plain_bytes)
