"""Models of public packages train planned as they do plain. Needs the extra `field`; takes half an hour."""

from __future__ import annotations

import pytest

from benchmarks.field.case import load
from benchmarks.field.models import HOMES
from benchmarks.field.runner import append, run
from benchmarks.field.table import exact_share, table

pytestmark = pytest.mark.field


def test_nearly_all_are_exact_and_none_is_different_or_crashes(tmp_path):
    rows = [(case, precision) for case in load(HOMES).values() for precision in case.precisions]
    outcomes = []
    for outcome in run(rows):
        outcomes.append(outcome)
        append(tmp_path / "field.jsonl", outcome)
    text = table(outcomes, "this run", "pytest -m field")
    wrong = [o for o in outcomes if o.outcome in ("different", "over budget", "crashed", "broken")]
    assert not wrong, text
    assert exact_share(outcomes) >= 0.95, text
