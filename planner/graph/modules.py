"""Module paths: which module an op belongs to, which block of equal blocks, and rows of equal blocks as one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

from planner.graph.graph import Op

TOP = "(top)"
"""Stands for the model itself."""
_Path = tuple[str | tuple[str, ...], ...]
"""A path's parts; one that is a number as a tuple of numbers, of which `fold` collects several."""


def module_of(op: Op) -> str:
    """The module path in an op's source: "transformer.h.0.mlp"."""
    return op.source.module or TOP


def place_of(op: Op) -> str:
    """Where an op comes from, for people: its module path, or the file and line outside of any submodule."""
    return op.source.module or op.source.place or TOP


def block_of(path: str) -> str:
    """The outermost numbered module around a path: "transformer.h.0" of "transformer.h.0.mlp"; "" where there is none."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def kinds_of(paths: Iterable[str]) -> dict[str, str]:
    """Per path, what the module has in common with its equals in other layers: "h.*.mlp" of "h.0.mlp".

    A number at the end of a path stays, unless modules lie below: "h.0" around "h.0.mlp" is a block like "h.1", but "net.0" and
    "net.1" of a Sequential may be a Linear and a GELU.
    """
    paths = set(paths)
    around = {path[:at] for path in paths for at, sign in enumerate(path) if sign == "."}
    return {path: _kind(path, is_block=path in around) for path in paths}


def _kind(path: str, *, is_block: bool) -> str:
    parent, dot, last = path.rpartition(".")
    is_member = bool(parent) and last.isdecimal() and not is_block
    return re.sub(r"\d+", "*", parent if is_member else path) + (f"{dot}{last}" if is_member else "")


def fold(rows: Mapping[str, Hashable]) -> dict[str, tuple[str, ...]]:
    """Paths that differ in one number and have equal rows, as one: {"h.0-11.mlp": ("h.0.mlp", "h.1.mlp", ...)}.

    Order is kept: a folded row stands where its first path stood.
    """
    folded: dict[_Path, tuple[str, ...]] = {_split(path): (path,) for path in rows}
    for place in range(max((len(_numbers(path)) for path in folded), default=0)):
        alike: defaultdict[Hashable, list[_Path]] = defaultdict(list)
        for path, paths in folded.items():
            numbers = _numbers(path)
            spot = numbers[place] if place < len(numbers) else None
            alike[path if spot is None else (path[:spot], path[spot + 1 :], rows[paths[0]])].append(path)
        folded = {_merged(group, place): tuple(one for path in group for one in folded[path]) for group in alike.values()}
    return {".".join(map(_text, path)): paths for path, paths in folded.items()}


def _split(path: str) -> _Path:
    return tuple((part,) if part.isdecimal() else part for part in path.split("."))


def _numbers(path: _Path) -> list[int]:
    """Positions of the parts that are numbers."""
    return [i for i, part in enumerate(path) if not isinstance(part, str)]


def _merged(group: list[_Path], place: int) -> _Path:
    """Paths that differ in the number at a place, as one path."""
    if len(group) == 1:
        return group[0]
    spot = _numbers(group[0])[place]
    return (*group[0][:spot], tuple(number for path in group for number in path[spot]), *group[0][spot + 1 :])


def _text(part: str | tuple[str, ...]) -> str:
    if isinstance(part, str):
        return part
    return part[0] if len(part) == 1 else _ranges(map(int, part))


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
