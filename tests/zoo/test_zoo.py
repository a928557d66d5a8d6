"""Every model of the zoo trains bit-equal within its budget, or is refused for a known reason and trains as before."""

from __future__ import annotations

import pytest

from tests.support.zoo.check import MODELS, PRECISIONS, check
from tests.support.zoo.refusals import REFUSED

pytestmark = pytest.mark.zoo


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_exact_and_within_the_budget_or_refused_for_a_known_reason(name: str, precision: str) -> None:
    outcome = check(name, precision)
    if name in REFUSED:
        assert outcome.verdict in ("refused", "no eager step")
        assert REFUSED[name] in outcome.reason or outcome.verdict == "no eager step"
    else:
        assert outcome.verdict in ("exact", "no eager step"), outcome


def test_most_are_exact() -> None:
    """Nineteen in twenty; what is missing stands in refusals.py."""
    assert len(MODELS) >= 60
    assert REFUSED.keys() <= MODELS.keys()
    assert len(REFUSED) <= len(MODELS) / 20
