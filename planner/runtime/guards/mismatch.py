"""Mismatch: why a call does not run planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MismatchKind = Literal["input", "argument", "weight", "host", "mode", "module", "value", "device", "audit"]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference between a call, with the state it is made in, and the planned one.

    Attributes:
        kind: "input", "argument", "weight", "host" (Python's state), "mode" (training, grad mode, autocast, switches), "module"
            (submodules, hooks), "value" (a tensor's value that Python read), "device" or "audit" (the plan's results).
        where: what differs, as the user would write it: "body.scale", "input 0", "autocast".
        now, planned: its present and its planned value as short texts; "" where there is none to show.
        is_absent: the place is empty now and held something when the plan was made.
        text: the whole sentence, where it is not "{where} is {now}, planned for {planned}".
        cure: what to do, as a sentence; "" where that follows from the kind, or depends.
    """

    kind: MismatchKind
    where: str
    now: str = ""
    planned: str = ""
    is_absent: bool = False
    text: str = ""
    cure: str = ""

    def __str__(self) -> str:
        """'body.scale is 3.0, planned for 2.0'."""
        if self.text or not self.now:
            return self.text or f"{self.where} differs"
        return f"{self.where} is {self.now}, planned for {self.planned}" if self.planned else f"{self.where} is {self.now}"

    @property
    def explained(self) -> str:
        """The text, and the cure as a further sentence."""
        return f"{self}. {self.cure}" if self.cure else str(self)
