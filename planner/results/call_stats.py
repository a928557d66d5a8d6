"""CallStats: how a planned module's calls ran so far. Prints as a table."""

from __future__ import annotations

from dataclasses import dataclass

from planner.report.tables import Block, facts, number, render, table, words


@dataclass(frozen=True, slots=True)
class CallStats:
    """Counts since the planned module was made.

    Attributes:
        planned: training calls that ran planned.
        unplanned: training calls that ran the model's own forward.
        evaluations: calls in eval mode or under no_grad, which always run the model's own forward.
        reasons: why training calls ran unplanned, as (kind, what was not as planned, calls), the most frequent first; the kinds
            are those of `Mismatch`: "input", "argument", "value", "weight", "host", "mode", "module", "device", "audit".
        sizes: (shapes of the call's tensors, planned calls), the planned call's own first. Calls of the same shapes name the
            arguments in which they differ; those that differ in a value that Python reads have a row each.
        audits: calls at which the original forward ran beside the planned one and gave the same.
        skipped_audits: calls at which the budget had no place for that.
        pauses: (what was captured or planned, seconds of wall clock that its first call waited), in order.
    """

    planned: int
    unplanned: int
    evaluations: int = 0
    reasons: tuple[tuple[str, str, int], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    audits: int = 0
    skipped_audits: int = 0
    pauses: tuple[tuple[str, float], ...] = ()

    @property
    def planning_s(self) -> float:
        """Seconds of wall clock that calls waited for captures and plans of other sizes."""
        return sum(seconds for _, seconds in self.pauses)

    def __str__(self) -> str:
        skipped = f"; {self.skipped_audits} left out for the budget" if self.skipped_audits else ""
        rows = [
            ("calls", f"{self.planned} planned, {self.unplanned} unplanned, {self.evaluations} in evaluation"),
            ("audits", f"{self.audits}, all equal{skipped}" if self.audits or skipped else "none so far"),
            ("waited", f"{self.planning_s:.1f} s for captures and plans of other sizes" if self.planning_s else ""),
        ]
        sizes = [(text, str(count)) for text, count in self.sizes]
        parts: list[Block] = [facts(rows), "", table([words("shapes"), number("planned calls")], sizes)]
        if self.reasons:
            reasons = [(kind, text, str(count)) for kind, text, count in self.reasons]
            parts += ["", table([words("unplanned:"), words("because of"), number("calls")], reasons)]
        return render(*parts)
