"""Fields of a JSON file that anybody may have written: read strictly, so that a wrong one is a ValueError that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, BinaryIO

from planner.units import MOST_BYTES, kind, shown

MOST_FILE_BYTES = 2**30
"""No plan file is larger; a compressed one is not unpacked further."""
MOST_NUMBER = 2**53
"""No byte or nanosecond count is larger: thousands of them still add up within 64 bits."""


def parse(text: str) -> Any:
    """JSON as RFC 8259 has it: no NaN, no infinity, no key twice.

    Raises:
        ValueError: something else, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands there twice")
    return fields


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number that JSON knows")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]}... is too large")
    return number


def read_all(file: BinaryIO) -> bytes:
    """The content of a file.

    Raises:
        ValueError: it is larger than any plan.
    """
    content = file.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"it is larger than {MOST_FILE_BYTES} bytes")
    return content


def integer(value: Any, what: str, low: int = 0, high: int = MOST_NUMBER) -> int:
    """An integer between two bounds."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, not an integer from {low} to {high}")
    return value


def number(value: Any, what: str) -> float:
    """A finite number that is not negative."""
    if type(value) not in (int, float) or not 0 <= value <= MOST_BYTES:
        raise ValueError(f"{what} is {shown(value)}, not a number that is not negative")
    return float(value)


def string(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind(value)}, not a string")
    return value


def choice(value: Any, what: str, known: Sequence[str]) -> str:
    """One of some strings."""
    if string(value, what) not in known:
        raise ValueError(f"{what} is {shown(value)}, not one of {', '.join(map(repr, known))}")
    return str(value)


def boolean(value: Any, what: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {kind(value)}, not true or false")
    return value


def rows(value: Any, what: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {kind(value)}, not a list")
    return value


def table(value: Any, what: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {kind(value)}, not an object")
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    """A list of strings."""
    return tuple(string(item, f"an entry of {what}") for item in rows(value, what))


def pairs(value: Any, what: str) -> tuple[tuple[str, str], ...]:
    """An object of strings, sorted."""
    return tuple(sorted((key, string(item, f"{what}[{shown(key)}]")) for key, item in table(value, what).items()))


def reason(error: Exception) -> str:
    """An error's text as part of another's: one line, not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:296]} ..."
