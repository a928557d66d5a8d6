"""Why a plan keeps what it keeps: bytes and time by module, and what more or less memory would be worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.errors import InfeasibleBudgetError, NoScheduleFoundError
from planner.graph.graph import Graph
from planner.graph.modules import fold, module_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.solver.solve import Solver
from planner.units import format_bytes

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """What happens to the activations of a module, or of several with equal figures.

    Attributes:
        label: its path; "h.0-11.mlp" stands for twelve.
        count: how many modules.
        kept_bytes: of activations alive between forward and backward, summed over the modules.
        freed_bytes: of those that the plain step keeps and this one does not.
        recomputed_bytes: what is written again, each time counted.
        recomputed_ns: time of writing it again.
        worth_ns: time of the ops that write what could be freed, or is: what freeing all of it costs at least.
        rank: place among the rows by `rate`, 1 for the most bytes per time; 0 where nothing can be freed.
    """

    label: str
    count: int
    kept_bytes: int
    freed_bytes: int
    recomputed_bytes: int
    recomputed_ns: int
    worth_ns: int
    rank: int = 0

    @property
    def rate(self) -> float:
        """Bytes freed per nanosecond of recompute: what the plan gets, or for what it only keeps, what it would get."""
        if self.freed_bytes:
            return self.freed_bytes / max(1, self.recomputed_ns)
        return self.kept_bytes / max(1, self.worth_ns) if self.worth_ns else 0.0

    @property
    def why(self) -> str:
        """The reason, in words."""
        if self.freed_bytes and not self.recomputed_ns:
            return "freed for nothing: never read again"
        if self.freed_bytes:
            return "frees this much" + (", the rest is kept" if self.kept_bytes else "")
        if self.recomputed_ns:
            return "runs again for other modules"
        return "would free this much" if self.rank else "cannot be recomputed"


@dataclass(frozen=True, slots=True)
class Price:
    """What another budget means for the step time.

    Attributes:
        budget_bytes: the other budget.
        saved_ns: by how much the step is faster there than in the plan (negative: slower); None where there is no plan.
        reason: why there is none, else "".
    """

    budget_bytes: int
    saved_ns: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Explained:
    """The data of an `Explanation`.

    Attributes:
        plan: what is explained.
        rows: by module, the most bytes first.
        more, less: the next bit of memory, and the last one; None where prices were not asked for, and `more` also where
            the plain step fits.
    """

    plan: PlannedGraph
    rows: tuple[ModuleRow, ...]
    more: Price | None
    less: Price | None


def explain(plan: PlannedGraph, *, prices: bool = True, limits: Limits | None = None) -> Explained:
    """Explain a plan; needs no torch.

    Args:
        plan: from `planner.plan`, or loaded.
        prices: also solve for a little more and a little less memory: 1 GiB, or a tenth of a budget below 10 GiB.
        limits: what the solver may spend on that.
    """
    more, less = _prices(plan, limits or Limits()) if prices else (None, None)
    return Explained(plan, rows_of(plan), more, less)


def module_rows(graph: Graph, schedule: Schedule, saved: Iterable[str], wanted: Iterable[str]) -> dict[str, ModuleRow]:
    """What happens to the activations of each module, by its path, in the order in which modules run.

    Args:
        saved, wanted: `Timeline.saved` of the schedule and of the plain step.
    """
    outputs = set(graph.forward_outputs)
    saved, wanted = set(saved) - outputs, set(wanted) - outputs
    again = Counter(schedule.steps[t] for t in schedule.recomputes())
    figures: dict[str, ModuleRow] = {}
    for i, op in enumerate(graph.ops[: graph.num_forward_ops]):
        path = module_of(op)
        row = figures.get(path, ModuleRow(path, 1, 0, 0, 0, 0, 0))
        droppable = op.recomputable and (saved | wanted).intersection(op.writes)
        figures[path] = replace(
            row,
            kept_bytes=row.kept_bytes + _total(graph, saved.intersection(op.writes)),
            freed_bytes=row.freed_bytes + _total(graph, (wanted - saved).intersection(op.writes)),
            recomputed_bytes=row.recomputed_bytes + again[i] * _total(graph, op.writes),
            recomputed_ns=row.recomputed_ns + again[i] * op.cost_ns,
            worth_ns=row.worth_ns + (op.cost_ns if droppable else 0),
        )
    return {path: row for path, row in figures.items() if row.kept_bytes or row.freed_bytes or row.recomputed_ns}


def rows_of(plan: PlannedGraph) -> tuple[ModuleRow, ...]:
    """What happens to the activations of each module, the most bytes first."""
    used = module_rows(plan.graph, plan.solution.schedule, plan.timeline.saved, plan.plain.saved)
    folded = fold({path: replace(row, label="") for path, row in used.items()})
    return _ranked([_sum(label, [used[path] for path in paths]) for label, paths in folded.items()])


def _sum(label: str, rows: list[ModuleRow]) -> ModuleRow:
    return ModuleRow(
        label,
        len(rows),
        kept_bytes=sum(row.kept_bytes for row in rows),
        freed_bytes=sum(row.freed_bytes for row in rows),
        recomputed_bytes=sum(row.recomputed_bytes for row in rows),
        recomputed_ns=sum(row.recomputed_ns for row in rows),
        worth_ns=sum(row.worth_ns for row in rows),
    )


def _ranked(rows: list[ModuleRow]) -> tuple[ModuleRow, ...]:
    """With ranks by rate; equal rates share one."""
    rates = sorted({row.rate for row in rows if row.rate > 0}, reverse=True)
    ranked = [replace(row, rank=rates.index(row.rate) + 1 if row.rate > 0 else 0) for row in rows]
    return tuple(sorted(ranked, key=lambda row: -row.kept_bytes - row.freed_bytes))


def _total(graph: Graph, names: Iterable[str]) -> int:
    return sum(graph.value[name].nbytes for name in names)


def _prices(plan: PlannedGraph, limits: Limits) -> tuple[Price | None, Price | None]:
    """The plan's own schedule is a plan for the larger budget, so that one never costs more."""
    delta = _GIB if plan.budget_bytes >= 10 * _GIB else max(1, plan.budget_bytes // 10)
    plain_bytes, now_ns = plan.plain.peak_bytes, plan.timeline.time_ns
    # From where more memory buys nothing, the last bit is counted from there.
    fits = plan.budget_bytes >= plain_bytes
    upper, lower = min(plan.budget_bytes + delta, plain_bytes), min(plan.budget_bytes, plain_bytes) - delta
    asked = {budget: budget - (plan.margin_bytes if budget < plain_bytes else 0) for budget in (upper, lower)}
    found = Solver(plan.graph).sweep(asked.values(), limits)

    def price(budget_bytes: int) -> Price:
        answer = found[asked[budget_bytes]]
        if isinstance(answer, Solution):
            return Price(budget_bytes, now_ns - simulate(plan.graph, answer.schedule).time_ns)
        if isinstance(answer, InfeasibleBudgetError):
            return Price(budget_bytes, None, f"no schedule peaks below {format_bytes(answer.floor_bytes)}")
        assert isinstance(answer, NoScheduleFoundError)
        return Price(budget_bytes, None, "no schedule was found with the effort given")

    below, above = price(lower), None if fits else price(upper)
    if above is not None and above.saved_ns is not None:
        above = replace(above, saved_ns=max(0, above.saved_ns))
    if below.saved_ns is not None:
        below = replace(below, saved_ns=min(0, below.saved_ns))
    return above, below
