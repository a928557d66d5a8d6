"""Module paths: which module an op belongs to, which block of equal blocks, and rows of equal blocks as one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

from planner.graph.graph import Op

TOP = "(top)"
"""Stands for the model itself."""
_NUMBER = re.compile(r"(?<![^.])\d[\d,-]*(?![^.])")
"""A number between dots, or what `fold` makes of several: "0-3,5"."""


def module_of(op: Op) -> str:
    """The module path in an op's source: "transformer.h.0.mlp"."""
    return op.source.module or TOP


def place_of(op: Op) -> str:
    """Where an op comes from, for people: its module path, or the file and line outside of any submodule."""
    return op.source.module or op.source.place or TOP


def block_of(path: str) -> str:
    """The outermost numbered module around a path: "transformer.h.0" of "transformer.h.0.mlp"; "" where there is none."""
    found = _NUMBER.search(path)
    return path[: found.end()] if found else ""


def fold(rows: Mapping[str, Hashable]) -> dict[str, tuple[str, ...]]:
    """Paths that differ in one number and have equal rows, as one: {"h.0-11.mlp": ("h.0.mlp", "h.1.mlp", ...)}.

    Order is kept: a folded row stands where its first path stood.
    """
    folded: dict[str, tuple[str, ...]] = {path: (path,) for path in rows}
    for place in range(max((len(_NUMBER.findall(path)) for path in rows), default=0)):
        alike: defaultdict[tuple[str, str, Hashable], list[str]] = defaultdict(list)
        for label, paths in folded.items():
            numbers = list(_NUMBER.finditer(label))
            spot = numbers[place] if place < len(numbers) else None
            key = (label[: spot.start()], label[spot.end() :], rows[paths[0]]) if spot else (label, "", None)
            alike[key].append(label)
        folded = {
            _label(before, after, labels): tuple(path for label in labels for path in folded[label])
            for (before, after, _), labels in alike.items()
        }
    return folded


def _label(before: str, after: str, labels: list[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    numbers = (int(label[len(before) : len(label) - len(after)]) for label in labels)
    return f"{before}{_ranges(numbers)}{after}"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
