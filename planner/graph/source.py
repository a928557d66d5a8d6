"""Where in the user's code an op comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from planner.graph.fields import integer, rows, string

_TEXT = re.compile(r"(?:(?P<module>.*) )?(?:\((?P<note>[^()]*)\)|(?P<file>[^ ]+):(?P<line>\d{1,9}))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Source:
    """The submodule and the line that ran a kernel. False where neither is known; `str` is for people and is never parsed.

    Attributes:
        module: qualified name of the submodule; "" for the model itself.
        file: name of the source file, without its folder; "" where no line of the user's code is known.
        line: number of the line, from 1; 0 where it is not known.
        note: what is known in place of a line: the class of a module whose code is torch's, or that the module runs as it is.
    """

    module: str = ""
    file: str = ""
    line: int = 0
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.module or self.file or self.note)

    @property
    def place(self) -> str:
        """'model.py:12', or '(Linear)' where only the note is known; '' where nothing is."""
        if self.file:
            return f"{self.file}:{self.line}"
        return f"({self.note})" if self.note else ""

    def __str__(self) -> str:
        """'body.0 model.py:12'."""
        return " ".join(part for part in (self.module, self.place) if part)


NOWHERE = Source()
"""The source of an op that no line of the user's code runs, such as a sum of gradients."""


def source_to_json(source: Source) -> list[str | int]:
    """[module, file, line, note] for a file; [] for NOWHERE."""
    return [source.module, source.file, source.line, source.note] if source else []


def source_from_json(value: Any, what: str) -> Source:
    """What `source_to_json` returned. A text is what the first schema of plan files holds, "body.0 model.py:12".

    Raises:
        ValueError: neither; `what` names it.
    """
    if isinstance(value, str):
        return _from_text(value)
    fields = rows(value, what)
    if not fields:
        return NOWHERE
    if len(fields) != 4:
        raise ValueError(f"{what} has {len(fields)} fields, not 4")
    module, file, line, note = fields
    return Source(
        string(module, f"the module of {what}"),
        string(file, f"the file of {what}"),
        integer(line, f"the line of {what}"),
        string(note, f"the note of {what}"),
    )


def _from_text(text: str) -> Source:
    """A text of the first schema: it cannot tell a space in a file's name, and takes what comes before it for the module."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return Source(note=text)
    module, note, file, line = found.group("module", "note", "file", "line")
    return Source((module or "").strip(), file or "", int(line or 0), note or "")
