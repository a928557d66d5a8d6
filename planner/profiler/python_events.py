"""Python's own profiler (sys.setprofile), which sees every call: off while libraries do long work that nobody looks at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def python_events_off() -> Iterator[None]:
    """While entered, no function is told of this thread's calls and returns."""
    before = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        set_profiler(before)


def set_profiler(profiler: Any) -> None:
    """Let a profiler see calls: a function, None, or a cProfile.Profile, which only it can set."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        sys.setprofile(None)
        profiler.enable()
