"""planner cache: shows or removes the measured times of kernels. Needs no torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from planner.cli.arguments import add_json, say
from planner.errors import InputError

HELP = "show or clear the times of kernels that were measured on this machine"
_SHOWN = ("threads", "deterministic", "float32_matmul_precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", action="store_true", help="print the folder, and what its files hold")
    action.add_argument("--clear", action="store_true", help="remove the files: kernels are measured again when next needed")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0.

    Raises:
        InputError: a file cannot be removed.
    """
    from planner.profiler.cache import cache_files, clear, default_cache_dir
    from planner.results.figures import head

    folder = default_cache_dir().expanduser()
    found = {**head("cache"), "folder": str(folder)}
    if arguments.clear:
        try:
            removed = clear(folder)
        except (OSError, NotImplementedError) as error:
            raise InputError(f"{folder} cannot be cleared: {error}") from error
        say(
            arguments,
            f"{len(removed)} files removed from {folder}",
            {**found, "removed": len(removed)},
        )
        return 0
    files = cache_files(folder)
    say(
        arguments,
        _table(str(folder), files),
        {**found, "files": [_figures(file) for file in files]},
    )
    return 0


def _table(folder: str, files: Sequence[Any]) -> str:
    from planner.report.tables import facts, number, render, table, words
    from planner.units import format_bytes

    total = format_bytes(sum(file.nbytes for file in files))
    head = facts([("folder", folder), ("files", f"{len(files)}, {total}" if files else "none")])
    if not files:
        return render(head)
    columns = [number("kernels"), number("spread"), words("written"), words("measured on")]
    return render(head, "", table(columns, map(_row, files)))


def _row(file: Any) -> tuple[str, ...]:
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified_s))
    if not file.is_current:
        return "", "", written, "another release's, or damaged: not read"
    given = file.conditions
    others = (f"{name} {value}" for name, value in given.items() if name in _SHOWN)
    return (
        str(file.num_kernels),
        f"±{50 * file.spread:.2g}%",
        written,
        f"{given.get('device')}; torch {given.get('torch')}; {', '.join(others)}",
    )


def _figures(file: Any) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "modified_s": file.modified_s,
        "conditions": file.conditions if file.is_current else None,
        "kernels": file.num_kernels,
        "spread": file.spread,
    }
