"""What a search may spend: counted, not timed, so that the same call gives the same plan on a busy machine and on every rank.

A unit of work is about a second of one core of a common machine (the prices in `planner.solver.tuning` were measured on one
of 2023). The clock is only a backstop: it ends a search that takes many times longer than its work should.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from planner.limits import Limits
from planner.solver.tuning import BACKSTOP


@dataclass(slots=True)
class Meter:
    """Counts one call's work.

    Attributes:
        stop_s: of `time.monotonic()`; from then on nothing is left to spend.
        spent: units so far.
        start_s: of `time.monotonic()`.
        is_late: the clock has ended the search, so that another run of the same call may give another answer.
    """

    stop_s: float = math.inf
    spent: float = 0.0
    is_late: bool = False
    start_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Wall seconds so far, for people to read: nothing is decided by them."""
        return time.monotonic() - self.start_s


@dataclass(slots=True)
class Work:
    """What may be spent until a meter shows `until` units. A share of it spends from the same meter."""

    until: float = math.inf
    meter: Meter = field(default_factory=Meter)

    def charge(self, units: float) -> None:
        """Say what was spent."""
        self.meter.spent += units
        self.meter.is_late = self.meter.is_late or time.monotonic() >= self.meter.stop_s

    @property
    def left(self) -> float:
        """Units that may still be spent."""
        return 0.0 if self.meter.is_late else max(0.0, self.until - self.meter.spent)

    @property
    def is_over(self) -> bool:
        """Nothing is left."""
        return self.left <= 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds up to the backstop."""
        return self.meter.stop_s - time.monotonic()

    def share(self, units: float) -> Work:
        """At most this many of the units that are left."""
        return Work(min(self.until, self.meter.spent + units), self.meter)


def begin(limits: Limits) -> Work:
    """Begin to spend what a call may spend."""
    limit_s = BACKSTOP * (1 + limits.effort) if limits.time_limit_s is None else limits.time_limit_s
    return Work(limits.effort, Meter(time.monotonic() + limit_s))
