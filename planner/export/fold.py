"""Repeated blocks as functions: ranges of lines that belong to one module each and come out as the same text.

Two ranges are the same function if they are the same text, once the module's name is taken out of it. So a function is right
wherever it is called, however the ranges were chosen; they are chosen where a person would cut, at modules, outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.export.body import Body, Words
from planner.export.lines import WrittenPass

_LEAST_LINES = 10
"""A function with fewer lines is not worth a jump of the eye."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines [start, stop) of a half, all of the module `prefix` or of its submodules."""

    start: int
    stop: int
    prefix: str
    body: Body

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same function as another block."""
        return (*self.body.argument_names, self.body.text)

    @property
    def list_name(self) -> str:
        """What the module is a numbered member of; "" if of nothing."""
        container, _, number = self.prefix.rpartition(".")
        return f"{container}." if number.isdigit() else ""


def repeated(written: WrittenPass, words: Words) -> list[list[Block]]:
    """Blocks of a half that do not overlap, those of one function together, in order of the first.

    Where some of a list of modules are folded, the others become functions too, even if each is called once: the plan treats
    a few layers otherwise, and a reader looks for all of them in the same place.
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
