"""Reads of environment variables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def environment_noted(note: Callable[[str], None]) -> Iterator[None]:
    """While entered, `note` gets the name of each environment variable that is read."""
    environ: Any = type(os.environ)
    read_variable = environ.__getitem__

    def look_up(this: Any, key: str) -> str:
        note(key)
        return str(read_variable(this, key))

    environ.__getitem__ = look_up
    try:
        yield
    finally:
        environ.__getitem__ = read_variable
