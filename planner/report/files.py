"""Writing files that a user names."""

from __future__ import annotations

from pathlib import Path

from planner.arguments import check_path
from planner.errors import InputError


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file; text as UTF-8.

    Raises:
        InputError: the path cannot name a file, or the file cannot be written.
    """
    check_path(path)
    try:
        Path(path).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
