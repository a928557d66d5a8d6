"""CallStats: how a planned module's calls ran so far. Prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from planner.report.tables import Block, facts, number, render, table, words


@dataclass(frozen=True, slots=True)
class CallStats:
    """Counts since the planned module was made.

    Attributes:
        planned, unplanned: calls; those under no_grad or in evaluation are unplanned.
        reasons: (what was not as planned, calls), the most frequent first.
        sizes: (shapes of the call's tensors, planned calls), the planned call's own first; calls of one size that differ in a
            value that Python reads have a row each.
        audits: calls at which the original forward ran beside the planned one and gave the same.
        skipped_audits: calls at which the budget had no place for that.
        planning_s: seconds of wall clock that calls waited for captures and plans of other sizes.
    """

    planned: int
    unplanned: int
    reasons: tuple[tuple[str, int], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    audits: int = 0
    skipped_audits: int = 0
    planning_s: float = 0.0

    def __str__(self) -> str:
        skipped = f"; {self.skipped_audits} left out for the budget" if self.skipped_audits else ""
        rows = [
            ("calls", f"{self.planned} planned, {self.unplanned} unplanned"),
            ("audits", f"{self.audits}, all equal{skipped}" if self.audits or skipped else "none so far"),
            ("waited", f"{self.planning_s:.1f} s for captures and plans of other sizes" if self.planning_s else ""),
        ]
        parts: list[Block] = [facts(rows), "", table([words("shapes"), number("planned calls")], _texts(self.sizes))]
        if self.reasons:
            parts += ["", table([words("unplanned because of"), number("calls")], _texts(self.reasons))]
        return render(*parts)


def _texts(rows: tuple[tuple[str, int], ...]) -> list[tuple[str, str]]:
    return [(text, str(count)) for text, count in rows]
