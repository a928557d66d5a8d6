"""Why a unit is not traced once."""

from __future__ import annotations


class Refused(Exception):
    """Tracing a unit once might change the graph.

    Attributes:
        units: those to leave out, after which another try may succeed; empty where only tracing the whole model helps.
    """

    def __init__(self, reason: str, *units: str) -> None:
        super().__init__(reason)
        self.units = units
