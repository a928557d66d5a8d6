"""Bytes and nanoseconds, read from and written for people."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

from planner.errors import BudgetError

MOST_BYTES = 2**62
"""More than any size that is read: sums of sizes below it fit into 64 bits."""

_BYTES = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,  # one letter is binary, as at `docker run --memory 24g`, in Slurm, and in `java -Xmx24g`
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_DIGITS = 30
"""More digits than a size has."""
_LONGEST = 80
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_FRACTION = re.compile(r"\s*([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=\s*%))\s*(%?)\s*")
"""A number with a decimal point and no unit, or a percentage."""
_EXAMPLES = "'24GiB', '800MB' or an int of bytes"
_SCARCE_BYTES = 2**20
"""Fewer than any step takes: a number without a unit that is below this was meant in another unit."""


def parse_bytes(text: Any, what: str = "size", *, least: int = 1, how: str = _EXAMPLES) -> int:
    """Bytes of "6GiB" or "6g" (binary units), "6GB" (decimal units), "6442450944" or an int (of numpy's, too).

    Args:
        what: what the number is, for errors: "budget".
        least: the smallest number that is accepted.
        how: examples of what can be read, for errors.

    Raises:
        BudgetError: not a size, below `least`, or beyond 64 bits.
    """
    nbytes: int | None = None
    if isinstance(text, Integral) and not isinstance(text, bool):
        nbytes = int(text)
    elif isinstance(text, str):
        match = _SIZE.fullmatch(text)
        unit = match and _BYTES.get(match[2].lower())
        if match and unit and (match[2] or "." not in match[1]):  # "0.6" is no number of bytes
            nbytes = _times(match[1], unit)
    if nbytes is None:
        raise BudgetError(f"write the {what} as {how}: {shown(text)} cannot be read")
    if nbytes < least:
        raise BudgetError(f"write the {what} as {how}: {shown(text)} is {'not positive' if least else 'negative'}")
    if nbytes > MOST_BYTES:
        raise BudgetError(f"write the {what} as {how}: {shown(text)} is more than any device has")
    return nbytes


def _times(number: str, unit: int) -> int:
    """A decimal number times a unit, rounded down."""
    whole, _, rest = number.partition(".")
    whole, rest = whole.lstrip("0") or "0", rest[:_DIGITS]
    if len(whole) > _DIGITS:
        return MOST_BYTES + 1
    power: int = 10 ** len(rest)
    return int(whole + rest) * unit // power


def parse_budget(budget: str | int | float, plain_peak_bytes: int) -> int:
    """Bytes of a budget given as bytes, as text, or as a fraction of the plain step's peak.

    Args:
        budget: int (bytes), str ("6GiB"; or a fraction, "0.6" or "60%"), or float in (0, 1] (fraction of
            `plain_peak_bytes`); numpy's scalars likewise.
        plain_peak_bytes: peak of the step that keeps everything.

    Raises:
        BudgetError: unreadable, not positive, or a fraction above 1.
    """
    fraction = fraction_of(budget)
    if fraction is not None:
        if not math.isfinite(fraction) or not 0 < fraction <= 1:
            raise BudgetError(
                f"write the budget as 0.6 or '60%' (a fraction of the plain step's peak, at most 1) or as {_EXAMPLES}: "
                f"{shown(budget)} is no such fraction"
            )
        return math.floor(fraction * plain_peak_bytes)
    if not isinstance(budget, (str, bytes, Real, type(None))):
        raise BudgetError(f"name the arguments, budget='24GiB' and args=(x,): what was given as the budget is {kind(budget)}")
    return parse_bytes(budget, "budget", how=f"{_EXAMPLES}, or a fraction of the plain step's peak such as '60%'")


def check_budget(budget: str | int | float) -> None:
    """Raise BudgetError for a budget that no model could give a meaning to."""
    parse_budget(budget, 2**62)


def fraction_of(budget: str | int | float) -> float | None:
    """The fraction of the plain step's peak that a budget is: 0.6 for 0.6, "0.6" and "60%". None for a number of bytes."""
    if isinstance(budget, str):
        match = _FRACTION.fullmatch(budget)
        return None if match is None else float(match[1]) / (100 if match[2] else 1)
    return float(budget) if isinstance(budget, Real) and not isinstance(budget, Integral) else None


def is_fraction(budget: str | int | float) -> bool:
    """Whether a budget is a fraction of the plain step's peak, and no number of bytes."""
    return fraction_of(budget) is not None


def budget_text(budget: str | int | float, budget_bytes: int) -> str:
    """A budget as its user gave it, with its bytes where it is a fraction: for messages."""
    fraction = fraction_of(budget)
    if fraction is not None:
        return f"{fraction:g} of the plain step's peak ({format_bytes(budget_bytes)})"
    text = shown(budget).strip("'") if isinstance(budget, str) else format_bytes(budget_bytes)
    is_bare = budget.strip().isdecimal() if isinstance(budget, str) else True
    return f"{text} (a number without a unit is bytes)" if is_bare and budget_bytes < _SCARCE_BYTES else text


def enough_text(nbytes: int) -> str:
    """A size to type in, '3.91 GiB': rounded up, so that what is read from it is not less than `nbytes`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            hundredths = -(-nbytes * 100 // 1024**power)
            return f"{hundredths // 100}.{hundredths % 100:02d} {unit}"
    return f"{nbytes} B"


def shown(value: Any) -> str:
    """An object in a message: its repr, in at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"of about {round(value.bit_length() * math.log10(2))} digits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of the user's, or an int of thousands of digits inside
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def kind(value: Any) -> str:
    """What an object is, for messages: 'a Tensor', 'the class Linear', 'a tuple of 2', 'None'."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value) is tuple:
        return f"a tuple of {len(value)}"
    return article(type(value).__name__)


def article(name: str) -> str:
    """A name with its article: "a Linear", "an Embedding"."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


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
