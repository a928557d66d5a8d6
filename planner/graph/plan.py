"""A solver's answer and the plan a user holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from planner.arguments import check_flags, check_path, limits
from planner.graph.graph import Graph
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline, simulate

if TYPE_CHECKING:
    from pathlib import Path


STATUSES = ("optimal", "feasible")
LIMITS = ("", "time")
"""What `Solution.status` and `Solution.limit` may be."""
RUN, NOT_RUN = "run", "not run"
"""How `Plan.check` starts."""


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


@dataclass(frozen=True, slots=True)
class Plan:
    """The product's data: a graph, a budget and the schedule that fits it. Prints as a table.

    Attributes:
        graph: what was planned, with the costs that were used.
        budget_bytes: bound on everything live on the device during a step.
        margin_bytes: part of the budget the schedule leaves free for the allocator.
        solution: schedule, bound and how it was found.
        provenance: how the graph's costs were found; None where that is not known (a bare graph).
        measured_bytes: measured peak of one planned step, everything resident included; None where none was run.
        check: "run" where one planned step was run, else "not run", with the reason after a colon.
    """

    graph: Graph
    budget_bytes: int
    margin_bytes: int
    solution: Solution
    provenance: Provenance | None = None
    measured_bytes: int | None = field(default=None, compare=False)
    check: str = field(default=NOT_RUN, compare=False)

    @property
    def timeline(self) -> Timeline:
        """The planned step, simulated."""
        return simulate(self.graph, self.solution.schedule)

    @property
    def is_estimated(self) -> bool:
        """Costs were computed instead of measured: what kernels need for themselves (workspace) is not known."""
        return self.provenance is not None and self.provenance.is_estimated

    @property
    def plain(self) -> Timeline:
        """The step that keeps everything, simulated."""
        return simulate(self.graph, keep_all(self.graph))

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the planned step."""
        return self.timeline.peak_bytes

    @property
    def overhead(self) -> float:
        """Predicted extra time, as a fraction of the plain step."""
        return self.timeline.time_ns / max(1, self.plain.time_ns) - 1

    @property
    def gap(self) -> float:
        """At most this fraction of the plain step could be saved by a better schedule."""
        return max(0, self.timeline.time_ns - self.solution.bound_ns) / max(1, self.plain.time_ns)

    def __str__(self) -> str:
        from planner.graph.table import table

        return table(self)

    def explain(self, *, prices: bool = True, effort: float = 6.0, time_limit_s: float | None = None) -> Any:
        """Why it keeps what it keeps, by module, and what a little more or less memory would be worth.

        Returns:
            a `planner.report.explain.Explanation`, which prints as a table.
        """
        check_flags(prices=prices)
        return _report("explain").explain(self, prices=prices, limits=limits(effort, time_limit_s))

    def plot(self, path: str | Path) -> None:
        """Draw live bytes over the step, plain above planned, into a .png or .svg file.

        Raises:
            PlotMissingError: matplotlib (the extra `plot`) is not installed.
            InputError: another suffix, or the file cannot be written.
        """
        check_path(path)
        _report("timeline").plot(self, path)

    def trace(self, path: str | Path) -> None:
        """Write the plain and the planned step as a trace that Perfetto and chrome://tracing open.

        Raises:
            InputError: the file cannot be written.
        """
        check_path(path)
        _report("trace").trace(self, path)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (docs/plan-file.md).

        Raises:
            InputError: the file cannot be written.
        """
        from planner.graph import planfile

        planfile.save(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanFileError: not JSON, another schema version, or inconsistent.
        """
        from planner.graph import planfile

        return planfile.load(path)


def _report(name: str) -> Any:
    """Import planner.report.<name> when it is asked for: graph/ must not depend on report/."""
    return import_module(f"planner.report.{name}")
