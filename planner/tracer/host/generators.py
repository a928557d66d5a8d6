"""Random generators of the host: their states, compared and put back."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def generator_state(value: Any) -> Any:
    """A generator's state, which can be compared by its text."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return copy.deepcopy(value.bit_generator.state) if hasattr(value, "bit_generator") else value.get_state(legacy=False)


class Generators:
    """States of the random generators that a forward can draw from beside those it holds itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def devices(self) -> list[int]:
        """CUDA devices in use, whose generators are put back beside the host's."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return list(range(torch.cuda.device_count())) if in_use else []

    def host(self) -> tuple[Any, ...]:
        """Python's and numpy's global states; numpy only where it is imported."""
        numpy = sys.modules.get("numpy")
        state = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None
        return (random.getstate(), None if state is None else (state[0], state[1].tobytes(), *state[2:]))

    def remembered(self) -> Callable[[], None]:
        """What puts Python's and numpy's global states back to what they are now."""
        numpy = sys.modules.get("numpy")
        python = random.getstate()
        state = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None

        def put_back() -> None:
            random.setstate(python)
            if numpy is not None and state is not None:
                numpy.random.set_state(state)

        return put_back

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Put all of them back at the end: Python's, numpy's, torch's on every device in use."""
        put_back = self.remembered()
        with torch.random.fork_rng(devices=self.devices()):
            try:
                yield
            finally:
                put_back()
