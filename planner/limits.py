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
