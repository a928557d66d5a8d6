"""What came of one model in one precision."""

from __future__ import annotations

from dataclasses import dataclass

OUTCOMES = ("exact", "in units", "unplanned", "refused", "different", "over budget", "crashed", "broken")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One record of the benchmark.

    Attributes:
        outcome: "exact": every step ran planned, bit-equal, within the budget.
            "in units": refused as a whole; what `plan_units` plans of its submodules trained bit-equal, within the budget.
            Calls of units may be mismatches, which ran the original forward with a warning.
        "unplanned": equal, but some steps were mismatches, which ran the original forward with a warning.
            "refused": a PlannerError, before training or in it.
            "different": something is not bit-equal; also what planning itself changed.
            "over budget": equal, but the measured peak is above the budget.
            "crashed": any other exception, the end of the process, or the time limit, where eager has none of these.
            "broken": eager fails, or differs from itself; the case says nothing.
        reason: message, or names of what differs.
        steps, planned_steps: how many were trained, and how many of these ran planned.
        plain_bytes: measured peak of the plain step.
        budget_bytes, predicted_bytes, peak_bytes: of the plan; the last as measured; 0 where it was not.
        overhead: predicted share of the plain step's time.
        units: number of submodules that were planned; 0 where the whole model was.
        opaque: submodules that run as they are.
        seconds: wall time of planning; of everything for a refusal or a crash.
    """

    case: str
    precision: str
    outcome: str
    reason: str = ""
    version: str = ""
    torch: str = ""
    steps: int = 0
    planned_steps: int = 0
    plain_bytes: int = 0
    budget_bytes: int = 0
    predicted_bytes: int = 0
    peak_bytes: int = 0
    overhead: float = 0.0
    units: int = 0
    opaque: str = ""
    notes: str = ""
    seconds: float = 0.0
