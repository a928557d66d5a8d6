"""Random generators of the host: their states, compared and restored."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from planner.profiler.python_events import python_events_off
from planner.tracer.faults import calls_users_code
from planner.tracer.host.values import is_array


def generator_state(value: Any) -> Any:
    """A generator's state, which can be compared by its text."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    own = value.get_state(legacy=False) if hasattr(value, "get_state") else _bits(value).state
    seeds = seed_sequence_of(value)
    return copy.deepcopy(own), None if seeds is None else seeds.__reduce__()[2]  # its count itself cannot be written


def set_numpy_state(value: Any, state: Any) -> None:
    """Put a generator of numpy's into a state that `generator_state` returned."""
    own, of_seeds = state
    seeds = seed_sequence_of(value)
    if seeds is not None:
        seeds.__setstate__(of_seeds)
    if hasattr(value, "set_state"):
        value.set_state(own)
    elif seeds is not value:
        _bits(value).state = own


def _bits(value: Any) -> Any:
    """The source of bits of a generator of numpy's."""
    return getattr(value, "bit_generator", getattr(value, "_bit_generator", value))


def seed_sequence_of(value: Any) -> Any:
    """The SeedSequence of a generator of numpy's, which counts what `spawn` makes; the value itself if it is one; or None."""
    bits = _bits(value)
    seeds = getattr(bits, "seed_seq", bits)
    return seeds if hasattr(seeds, "n_children_spawned") and hasattr(seeds, "__setstate__") else None


def _numpy_state() -> Any:
    """The state of numpy's global generator, of whichever kind it is; None where numpy is not imported."""
    numpy = sys.modules.get("numpy")
    return numpy.random.get_state(legacy=False) if numpy is not None and hasattr(numpy, "random") else None


def _comparable(state: Any) -> Any:
    """The state with bytes in the place of arrays."""
    if isinstance(state, dict):
        return {name: _comparable(item) for name, item in state.items()}
    return state.tobytes() if is_array(state) else state


@contextlib.contextmanager
def control_of_numpy_noted(note: Callable[[types.FrameType], None]) -> Iterator[None]:
    """While entered, `note` gets the frame of whoever controls numpy's global generator: that is no event for a profiler."""
    numpy = sys.modules.get("numpy")
    found = {name: getattr(numpy.random, name) for name in ("get_state", "set_state", "seed")} if numpy is not None else {}

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @calls_users_code
        def control(*args: Any, **kwargs: Any) -> Any:
            note(sys._getframe(1))
            return function(*args, **kwargs)

        return control

    try:
        for name, function in found.items():
            setattr(numpy.random, name, noted(function))  # type: ignore[union-attr]
        yield
    finally:
        for name, function in found.items():
            setattr(numpy.random, name, function)  # type: ignore[union-attr]


GENERATOR_CONTROLS = frozenset(
    {"manual_seed", "seed", "set_state", "get_state", "initial_seed", "graphsafe_set_state", "graphsafe_get_state"}
)
"""Methods of torch.Generator that control it, instead of drawing from it."""


@dataclass(frozen=True, slots=True)
class GeneratorCall:
    """A call that controls torch's generator.

    Attributes:
        module: the submodule whose forward makes it, "" for the model's own.
        function: the method of torch.Generator.
        is_checkpoint: torch.utils.checkpoint makes it, to recompute in the backward with the same random numbers.
    """

    module: str
    function: str
    is_checkpoint: bool


class Generators:
    """States of the random generators that a forward can draw from beside those it holds itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def devices(self) -> list[int]:
        """CUDA devices in use, whose generators are put back beside the host's."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return list(range(torch.cuda.device_count())) if in_use else []

    def host(self) -> tuple[Any, ...]:
        """Python's and numpy's global states, which can be compared; numpy only where it is imported."""
        with python_events_off():
            return (random.getstate(), _comparable(_numpy_state()))

    def remembered(self) -> Callable[[], None]:
        """A function that restores the present global states of Python's and numpy's generators."""
        python, state = random.getstate(), _numpy_state()

        def restore() -> None:
            random.setstate(python)
            if state is not None:
                sys.modules["numpy"].random.set_state(state)

        return restore

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """At exit, restore all of them: Python's, numpy's, torch's on every device in use."""
        restore = self.remembered()
        with torch.random.fork_rng(devices=self.devices()):
            try:
                yield
            finally:
                restore()

    def of_torch(self) -> tuple[bytes, ...]:
        """States of torch's default generators, of the host and of the devices in use."""
        return (_bytes_of_state(), *map(_bytes_of_state, self.devices()))

    def restorers(self) -> list[Callable[[], Any]]:
        """Functions that restore the present states of all of them whenever they are called; they hold no tensors."""
        restored: list[Callable[[], Any]] = [partial(_set_state, _bytes_of_state(), None), self.remembered()]
        return restored + [partial(_set_state, _bytes_of_state(index), index) for index in self.devices()]

    def seed(self, seed: int) -> None:
        """Seed all of them."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would leave its seed for a CUDA that is not in use yet
        for index in self.devices():
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)


def seed_own(generator: Any, seed: int) -> None:
    """Seed a generator that code holds itself: Python's, numpy's of both kinds, or torch's."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif hasattr(generator, "seed"):
        generator.seed(seed)
    elif seed_sequence_of(generator) is not generator:
        bits = _bits(generator)
        bits.state = type(bits)(seed).state


def _bytes_of_state(index: int | None = None) -> bytes:
    """State of the CPU generator or of a CUDA device's, as bytes: a tensor would count as memory of the step."""
    state = torch.get_rng_state() if index is None else torch.cuda.get_rng_state(index)
    return state.numpy().tobytes()


def _set_state(content: bytes, index: int | None) -> None:
    state = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if index is None:
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, index)
