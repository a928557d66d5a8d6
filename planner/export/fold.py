"""Repeated blocks as functions: ranges of lines, each of one module, that have the same text.

Two ranges become one function if their texts are equal apart from the module's name. So a function is right wherever it is
called, however the ranges were chosen; they are chosen at module boundaries, outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.export.body import Body, Words
from planner.export.lines import WrittenPass

_LEAST_LINES = 10
"""Shorter blocks stay where they are: a function would make them harder to read."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines [start, stop) of a pass, all of the module `prefix` or of its submodules."""

    start: int
    stop: int
    prefix: str
    body: Body

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for blocks that become one function."""
        return (*self.body.argument_names, self.body.text)

    @property
    def list_name(self) -> str:
        """The list that the module is a numbered member of ("layers."); "" if there is none."""
        container, _, number = self.prefix.rpartition(".")
        return f"{container}." if number.isdigit() else ""


def repeated(written: WrittenPass, words: Words) -> list[list[Block]]:
    """Disjoint blocks of a pass, grouped by function, in order of the first block.

    Where some members of a list of modules become functions, the others do, too, even if each is called once: the plan treats a
    few layers differently, and a reader looks for all of them in the same place.
    """
    found: list[list[Block]] = []
    todo = [(0, len(written.lines))]
    for depth in range(1, 1 + max((line.module.count(".") + 1 for line in written.lines if line.module), default=0)):
        alike: dict[tuple[str, ...], list[Block]] = {}
        for start, stop in todo:
            for begin, end, prefix in _runs(written, start, stop, depth):
                block = Block(begin, end, prefix, Body(written, words, begin, end, prefix))
                alike.setdefault(block.key, []).append(block)
        large = [blocks for blocks in alike.values() if blocks[0].body.text.count("\n") >= _LEAST_LINES]
        lists = {block.list_name for blocks in large if len(blocks) > 1 for block in blocks} - {""}
        folded = [blocks for blocks in large if len(blocks) > 1 or blocks[0].list_name in lists]
        found += folded
        left = [block for blocks in alike.values() if blocks not in folded for block in blocks]
        todo = sorted((block.start, block.stop) for block in left)
    return sorted(found, key=lambda blocks: blocks[0].start)


def _runs(written: WrittenPass, start: int, stop: int, depth: int) -> Iterator[tuple[int, int, str]]:
    """Longest ranges of lines whose modules agree in the first `depth` parts; lines of modules with fewer are left out."""
    begin, current = start, ""
    for i in range(start, stop + 1):
        parts: Sequence[str] = written.lines[i].module.split(".") if i < stop else ()
        prefix = ".".join(parts[:depth]) if len(parts) >= depth else ""
        if prefix != current or i == stop:
            if current:
                yield begin, i, current
            begin, current = i, prefix
