"""LibraryGuard: whether libraries hold and return what the forward read of them when it was captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from planner.runtime.guards.mismatch import Mismatch
from planner.tracer.host.fingerprint import alike, first_difference
from planner.tracer.host.library_reads import LibraryRead, reader
from planner.tracer.host.values import ABSENT


class LibraryGuard:
    """Compares variables and functions of libraries with those that were read, and what functions return.

    Args:
        reads: what was read.
    """

    def __init__(self, reads: Sequence[LibraryRead]) -> None:
        held = tuple(read for read in reads if read.arguments is None and _keeps_its_value(read.value()))
        self._held, self._values = held, list[Any]()
        self._others = [read for read in reads if read not in held]
        self._read: Callable[[], tuple[Any, ...]] = reader(held) if held else tuple
        self._is_known = False

    def mismatch(self) -> Mismatch | None:
        """The first of them that is not as planned."""
        now = self._now()
        if now is None or not self._is_known or not all(map(is_, now, self._values)):
            found = _first(self._held)
            if found is not None:
                return found
            self._values, self._is_known = list(now or ()), now is not None
        return _first(self._others)

    def _now(self) -> tuple[Any, ...] | None:
        try:
            return self._read()
        except AttributeError:  # one was deleted
            return None


def _keeps_its_value(value: Any) -> bool:
    """The same object is the same value; what a list holds may change."""
    return value is not ABSENT and not isinstance(value, list)


def _first(reads: Sequence[LibraryRead]) -> Mismatch | None:
    for read in reads:
        now = read.now()
        if not alike(read.expected, now):
            found = first_difference(read.expected, now, str(read))
            return Mismatch("host", found.where, found.now, found.planned, found.is_absent)
    return None
