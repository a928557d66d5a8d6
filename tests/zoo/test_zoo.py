"""Every model of the zoo trains bit-equal within its budget, or is refused for a known reason and trains as before."""

from __future__ import annotations

import pytest

from tests.support.zoo.check import MODELS, PRECISIONS, check
from tests.support.zoo.refusals import MAY_LACK_A_KERNEL, REFUSED

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_exact_and_within_the_budget_or_refused_for_a_known_reason(name: str, precision: str) -> None:
    outcome = check(name, precision)
    allowed = {"refused" if name in REFUSED else "exact"}
    if (name, precision) in MAY_LACK_A_KERNEL:
        allowed.add("no eager step")
    assert outcome.verdict in allowed, outcome
    assert REFUSED.get(name, "") in outcome.reason


def test_what_is_said_of_a_model_is_said_of_one_that_is_tried() -> None:
    assert {*REFUSED, *(name for name, _ in MAY_LACK_A_KERNEL)} <= MODELS.keys()
