"""How every table of this package is laid out: at most as wide as the terminal, 80 columns where the output is no terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

Block = str | Table
"""Of a report: a line, or a table."""

WIDTH = 80
"""Columns where the output is not a terminal."""


def number(header: str) -> Column:
    """A column of figures: to the right, never broken."""
    return Column(header, justify="right", no_wrap=True)


def words(header: str, *, at_least: int = 0) -> Column:
    """A column of names or sentences, broken where the table would be too wide, but not below `at_least` characters."""
    return Column(header, overflow="fold", min_width=at_least or None)


def table(
    columns: Iterable[Column], rows: Iterable[Sequence[str]], *, gap: int = 2, title: str = "", caption: str = ""
) -> Table:
    """A table with a line below its head. `gap`: spaces between columns; title and caption: lines above and below it."""
    made = Table(
        *columns,
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    for row in rows:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A line for each (name, sentence) with a sentence, which goes on below itself where it is long."""
    made = Table.grid(Column(no_wrap=True), words(""), padding=(0, 1, 0, 0))
    for name, sentence in rows:
        if sentence:
            made.add_row(name, sentence)
    return made


def render(*parts: Block) -> str:
    """Tables and lines as text, one below the other, without colours or spaces at the ends of lines."""
    width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout is not None and sys.stdout.isatty() else WIDTH
    console = Console(
        width=width, color_system=None, force_terminal=False, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
