"""Bytes and nanoseconds, read from and written for people."""

from __future__ import annotations

import math
import re

from planner.errors import BudgetError

_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "6GiB" (binary units), "6GB" (decimal units), "6442450944" or an int.

    Raises:
        BudgetError: not a size, or not positive.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise BudgetError(f"cannot read {text!r} as a number of bytes; write an int or a string like '6GiB'")
    if isinstance(text, int):
        nbytes = text
    else:
        match = _SIZE.fullmatch(text)
        unit = match and _BYTES.get(match[2].lower())
        if not match or not unit:
            raise BudgetError(f"cannot read {text!r} as a number of bytes; write for example '6GiB', '800MB' or 6442450944")
        nbytes = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if nbytes <= 0:
        raise BudgetError(f"a size of {text!r} is not positive")
    return nbytes


def parse_budget(budget: str | int | float, plain_peak_bytes: int) -> int:
    """Bytes of a budget given as bytes, as text, or as a fraction of the plain step's peak.

    Args:
        budget: int (bytes), str ("6GiB"), or float in (0, 1] (fraction of `plain_peak_bytes`).
        plain_peak_bytes: peak of the step that keeps everything.

    Raises:
        BudgetError: unreadable, not positive, or a fraction above 1.
    """
    if isinstance(budget, float):
        if not math.isfinite(budget) or not 0 < budget <= 1:
            raise BudgetError(
                f"budget {budget!r}: a float is a fraction of the plain step's peak and must lie in (0, 1]; "
                "for bytes pass an int or a string like '6GiB'"
            )
        return math.floor(budget * plain_peak_bytes)
    return parse_bytes(budget)


def check_budget(budget: str | int | float) -> None:
    """Raise BudgetError for a budget that no model could give a meaning to."""
    parse_budget(budget, 2**62)


def format_bytes(nbytes: int) -> str:
    """'3.90 GiB': binary units, three significant figures or more."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):  # noqa: B007
        if abs(size) < 1024:
            break
        size /= 1024
    else:
        unit = "TiB"
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def format_ns(ns: float) -> str:
    """'12.3 ms'."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= scale:
            return f"{ns / scale:.3g} {unit}" if abs(ns) < 1000 * scale else f"{ns / scale:.0f} {unit}"
    return f"{ns:.0f} ns"
