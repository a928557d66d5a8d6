"""The explanation of a plan that a user holds."""

from __future__ import annotations

from dataclasses import dataclass

from planner.analysis.explain import Explained
from planner.report import explain_table


@dataclass(frozen=True, slots=True)
class Explanation(Explained):
    """Why a plan keeps what it keeps. Prints as a table; attributes as in `Explained`."""

    def __str__(self) -> str:
        return explain_table.text(self)
