"""What a call of the solver may spend."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_EFFORT = 10.0
"""Units of work that a call of the solver may take where nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call of the solver may spend.

    Attributes:
        effort: units of work, about a second of one core each (`planner.solver.work`).
        time_limit_s: wall seconds after which the search ends whatever it has; None: thirty for each unit, and thirty more.
    """

    effort: float = DEFAULT_EFFORT
    time_limit_s: float | None = None

    def share(self, fraction: float) -> Limits:
        """So much of it."""
        return Limits(fraction * self.effort, None if self.time_limit_s is None else fraction * self.time_limit_s)


@dataclass(slots=True)
class Spending:
    """What several calls of the solver may spend together. Each gets a part of what is left, so that there always is some.

    Attributes:
        limits: of all calls.
        left: the part of it that is not spent yet.
    """

    limits: Limits
    left: float = 1.0

    def take(self, fraction: float) -> Limits:
        """A fraction of what is left, for one call; it counts as spent."""
        part = fraction * self.left
        self.left -= part
        return self.limits.share(part)

    def give_back(self, taken: Limits, work: float) -> None:
        """Of what one call took, it has spent this much work."""
        self.left += max(0.0, taken.effort - work) / self.limits.effort
