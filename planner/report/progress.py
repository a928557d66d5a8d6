"""Progress on stderr: a spinner for stages that take more than a second; lines where it is no terminal and they are wanted."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_LINES: ContextVar[bool] = ContextVar("stages are said in lines", default=False)


@contextlib.contextmanager
def in_lines() -> Iterator[None]:
    """While entered, a stage is said in a plain line where stderr is no terminal: a pipe at the shell, a training job."""
    token = _LINES.set(True)
    try:
        yield
    finally:
        _LINES.reset(token)


def line(name: str, shown: bool) -> bool:
    """Say in a plain line that a stage begins, where stderr is no terminal and lines are wanted.

    Returns:
        whether stderr is no terminal, so that nothing that moves can be shown.
    """
    plain = not _stderr().is_terminal
    if plain and shown and _LINES.get() and sys.stderr is not None:
        print(f"planner: {name} ...", file=sys.stderr, flush=True)
    return plain


@contextlib.contextmanager
def stage(name: str, shown: bool) -> Iterator[None]:
    """Show a spinner with `name` on stderr while entered, once a second has passed; a line where stderr is no terminal."""
    if line(name, shown) or not shown:
        yield
        return
    status = _stderr().status(name)
    timer = threading.Timer(1.0, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def say(text: str, shown: bool) -> None:
    """A line on stderr, above a spinner: what a pause was for, or what was found so far."""
    if shown:
        _stderr().print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _stderr() -> Console:
    from rich.console import Console  # not before something is shown: the command line starts without it

    return Console(stderr=True)
