"""Progress on stderr: a spinner for stages that take more than a second, and lines of searches that take longer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rich.console import Console


@contextlib.contextmanager
def stage(name: str, shown: bool) -> Iterator[None]:
    """Show a spinner with `name` on stderr while entered, once a second has passed."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield
        return
    status = console.status(name)
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
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(text)
