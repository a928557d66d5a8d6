"""All that was found: schedules that nothing beats, proven bounds, and how far these are apart.

The only place that keeps schedules, by figures of its own. A plan for a small budget is a plan for a larger one, a
bound for a large budget holds for a smaller one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Simulator, Timeline, simulate
from planner.log import SOLVER
from planner.solver.certificate import NEVER_NS
from planner.solver.local_search import LocalSearch
from planner.solver.tuning import EVENT_UNITS
from planner.solver.work import Work


@dataclass(frozen=True, slots=True)
class Entry:
    """A schedule, what `simulate` says of it, and who found it."""

    schedule: Schedule
    timeline: Timeline
    source: str


class Archive:
    """One graph's schedules, none of which both takes longer and holds more than another, and bounds by budget."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.simulator = Simulator(graph)
        self._entries: list[Entry] = []
        self._bounds: dict[int, int] = {}
        self.offer(keep_all(graph), "keep all")

    def offer(self, schedule: Schedule, source: str) -> Timeline:
        """Simulate a schedule, the only figures that count. Bounds that it contradicts are forgotten.

        They hold for one order of the backward, and a schedule may have another; or HiGHS was wrong. Bounds of another archive
        (of the order that was captured, of smaller budgets tried apart) are never taken over, schedules are.
        """
        timeline = simulate(self.graph, schedule, self.simulator)
        peak, time_ns = timeline.peak_bytes, timeline.time_ns
        if all(e.timeline.peak_bytes > peak or e.timeline.time_ns > time_ns for e in self._entries):
            self._entries = [e for e in self._entries if e.timeline.peak_bytes < peak or e.timeline.time_ns < time_ns]
            self._entries.append(Entry(schedule, timeline, source))
            wrong = [budget for budget, ns in self._bounds.items() if budget >= peak and ns > time_ns]
            for budget in wrong:
                text = "%s takes %d ns in %d bytes: forget that nothing takes less than %d ns in %d"
                SOLVER.info(text, source, time_ns, peak, self._bounds.pop(budget), budget)
        return timeline

    def cheapest(self, budget_bytes: int) -> Entry | None:
        """The schedule within the budget that takes the least time."""
        fitting = [entry for entry in self._entries if entry.timeline.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda entry: entry.timeline.time_ns, default=None)

    @property
    def lowest(self) -> Entry:
        """The schedule with the lowest peak."""
        return min(self._entries, key=lambda entry: entry.timeline.peak_bytes)

    def lowest_except(self, schedules: Collection[Schedule]) -> Entry | None:
        """The schedule with the lowest peak but for these; None where there is no other."""
        others = [entry for entry in self._entries if entry.schedule not in schedules]
        return min(others, key=lambda entry: entry.timeline.peak_bytes, default=None)

    def raise_bound(self, budget_bytes: int, time_ns: int) -> None:
        """Record a proven bound: nothing that fits takes less. Dropped where a known schedule contradicts it."""
        best = self.cheapest(budget_bytes)
        if best is None or time_ns <= best.timeline.time_ns:
            self._bounds[budget_bytes] = max(time_ns, self._bounds.get(budget_bytes, 0))
        else:
            text = "a bound of %d ns in %d bytes is left out: %s takes %d ns"
            SOLVER.info(text, time_ns, budget_bytes, best.source, best.timeline.time_ns)

    def bound_ns(self, budget_bytes: int) -> int:
        """The least time, in ns, that a schedule within the budget can take, as far as was proven."""
        return max([ns for budget, ns in self._bounds.items() if budget >= budget_bytes], default=self.graph.plain_ns)


class Search:
    """The search for one budget.

    Attributes:
        local: local search for this budget.
    """

    def __init__(self, archive: Archive, budget_bytes: int) -> None:
        self.archive, self.budget_bytes = archive, budget_bytes
        self.local = LocalSearch(archive.graph, budget_bytes, archive.simulator)

    @property
    def best(self) -> Entry | None:
        """The cheapest schedule known that fits."""
        return self.archive.cheapest(self.budget_bytes)

    @property
    def bound_ns(self) -> int:
        """As far as was proven."""
        return self.archive.bound_ns(self.budget_bytes)

    @property
    def gap(self) -> float:
        """How far from the optimum the best schedule can be at most, as a fraction of the plain step's time; 1 without one."""
        best = self.best
        return 1.0 if best is None else max(0, best.timeline.time_ns - self.bound_ns) / max(1, self.archive.graph.plain_ns)

    @property
    def is_hopeless(self) -> bool:
        """Nothing fits: proven."""
        return self.best is None and self.bound_ns >= NEVER_NS

    @property
    def state(self) -> tuple[int, int]:
        """Changes whenever the search gets on."""
        return -1 if self.best is None else self.best.timeline.time_ns, self.bound_ns

    def raise_bound(self, time_ns: int) -> bool:
        """Say what was proven; True where it is news."""
        before = self.bound_ns
        self.archive.raise_bound(self.budget_bytes, time_ns)
        return self.bound_ns > before

    def offer(self, steps: Sequence[int], source: str, work: Work) -> Timeline:
        """Evaluate a schedule, and keep it if it is good."""
        work.charge(40 * EVENT_UNITS * len(steps))  # with names of what dies
        return self.archive.offer(Schedule(tuple(steps)), source)

    def fit(self, steps: Sequence[int], source: str, work: Work, *, near: float = float("inf")) -> list[int] | None:
        """Make a schedule fit by local search, free it from what it need not recompute, and offer that.

        Args:
            steps: the schedule.
            source: who made it.
            work: what may be spent.
            near: a schedule whose peak is above this multiple of the budget is left as it is.

        Returns:
            None where it does not fit: too far from it, beyond repair, or the work was over before.
        """
        useful, run = self.local.useful(list(steps))
        self.offer(useful, source, work)
        near_enough = int(run.live_bytes.max(initial=0)) <= near * self.budget_bytes
        repaired = self.local.repair(useful, work) if near_enough else None
        if repaired is None:
            return None
        made = self.local.shrink(repaired, work)
        self.offer(made, f"{source}, local search", work)
        return made
