"""Progress on stderr, for stages that take more than a second."""

from __future__ import annotations

import contextlib
import sys
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
    """Say in a line on stderr what a pause of training was for."""
    if shown and sys.stderr is not None:
        print(f"planner: {text}", file=sys.stderr, flush=True)
