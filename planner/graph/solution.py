"""A solver's answer."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph.schedule import Schedule

STATUSES = ("optimal", "feasible")
LIMITS = ("", "time")
"""What `Solution.status` and `Solution.limit` may be."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver returns. It states no peak: only `simulate` does.

    Attributes:
        status: "optimal" (the bound proves it, within the gap asked for), or "feasible" (the best found).
        schedule: the schedule on the graph the solver was given.
        bound_ns: no schedule with the captured backward order and these costs that fits the budget
            takes less time than this.
        solve_s: wall seconds spent.
        solver: which of its stages found the schedule, for example "certificate, local search".
        work: work units that the solver spent; 1.0 is about a second of one core of a typical machine. Repeats exactly, unlike
            `solve_s`.
        limit: "" where the solver ended by itself; "time" where the limit of wall-clock time stopped it, so that another run
            may give another plan.
    """

    status: str
    schedule: Schedule
    bound_ns: int
    solve_s: float
    solver: str
    work: float = 0.0
    limit: str = ""
