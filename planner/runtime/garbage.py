"""What planning within a call leaves to Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Planning that a training step waits for: at exit, its garbage is collected.

    An error that was caught on the way holds the frames that it came through, and these hold their callers' frames, the step's
    among them: until Python collects them, the step's output and all that its graph saved would stay.
    """
    try:
        yield
    finally:
        gc.collect()
