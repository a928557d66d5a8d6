from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import BudgetError
from planner.units import check_budget, format_bytes, format_ns, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 * 2**30),
        ("6 GB", 6 * 10**9),
        ("1.5kib", 1536),
        ("0.5MB", 500_000),
        (".5 mib", 2**19),
        ("6442450944", 6442450944),
        ("12b", 12),
        ("9007199254740993", 2**53 + 1),  # digits are never rounded through a float
        (7, 7),
    ],
)
def test_parse_bytes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "6 apples", "-3", "0", 0, -1, True, "1e9", "6GiB 2", None, 1.5])
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(BudgetError):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(1, 2**50), st.floats(0.001, 1.0))
def test_a_fraction_is_of_the_plain_peak(peak: int, fraction: float) -> None:
    assert 0 <= parse_budget(fraction, peak) <= peak
    assert parse_budget(1.0, peak) == peak
    assert parse_budget(str(peak), 1) == peak


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(BudgetError, match="fraction of the plain step's peak"):
        check_budget(fraction)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (4187593114, "3.90 GiB"), (2**41, "2.00 TiB")]
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("ns", "text"), [(7, "7 ns"), (1500, "1.5 us"), (12_300_000, "12.3 ms"), (2e9, "2 s"), (5e12, "5000 s")]
)
def test_format_ns(ns: float, text: str) -> None:
    assert format_ns(ns) == text
