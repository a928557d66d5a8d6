"""Changes that a Python function makes to state it can reach: counters, lists, generators, attributes."""

from __future__ import annotations

import operator
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<frozen")
_LIBRARY = sysconfig.get_path("stdlib")
_DEPTH, _MOST, _MOST_BYTES = 4, 1000, 2**20
_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_ATOMS = (bool, int, float, complex, str, bytes, type(None))


class Effects:
    """The state that Python code can read, noted whenever a function is entered, compared between two runs."""

    def __init__(self) -> None:
        self._runs: list[list[Any]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """While entered, one run: functions that are not torch's are noted with the state that they can read."""
        seen: list[Any] = []
        self._runs.append(seen)

        def enter(frame: types.FrameType, event: str, _arg: Any) -> None:
            if event == "call" and _is_recorded(frame.f_code.co_filename):
                seen.append((frame.f_code.co_filename, frame.f_code.co_firstlineno, _readable(frame)))

        previous = sys.getprofile()
        sys.setprofile(enter)
        try:
            yield
        finally:
            sys.setprofile(previous)

    def differ(self) -> bool:
        """The runs did not find the same state, or did not call the same functions."""
        return any(run != self._runs[0] for run in self._runs[1:])


def _is_recorded(file: str) -> bool:
    """Code of the user's, and of packages other than torch and Python's own."""
    return not file.startswith(_SKIPPED) and (not file.startswith(_LIBRARY) or "site-packages" in file)


def _readable(frame: types.FrameType) -> Any:
    """Globals that the function names, variables of the functions around it, and its arguments, but for tensors."""
    code, inside = frame.f_code, frame.f_locals
    free = {k: v for k, v in inside.items() if k in code.co_freevars or not isinstance(v, torch.Tensor)}
    named = {name: frame.f_globals[name] for name in code.co_names if name in frame.f_globals}
    return _state({**named, **free}, _DEPTH, frozenset(code.co_names))


def _state(value: Any, depth: int, names: frozenset[str]) -> Any:
    """A value as nested tuples that are equal where nothing in it changed; new objects count by their contents."""
    if isinstance(value, _ATOMS):
        return (type(value).__name__, repr(value))
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if depth == 0 or isinstance(value, _NAMED):
        return value.__qualname__ if isinstance(value, _NAMED) else type(value).__qualname__
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    kind = str(getattr(type(value), "__module__", "")).partition(".")[0]
    if kind == "numpy":
        return _of_numpy(value)
    if isinstance(value, Mapping):
        return tuple((_state(k, depth - 1, names), _state(v, depth - 1, names)) for k, v in [*value.items()][:_MOST])
    if isinstance(value, (list, tuple, deque)):
        return (len(value), *(_state(item, depth - 1, names) for item in [*value][:_MOST]))
    if isinstance(value, (set, frozenset)):
        return frozenset(_state(item, depth - 1, names) for item in value)
    if kind == "torch" or (isinstance(value, type) and str(getattr(value, "__module__", "")).startswith(("builtins", "torch"))):
        return type(value).__qualname__
    held = getattr(value, "__dict__", {})
    if isinstance(value, types.ModuleType):  # of a module, what the code names
        held = {name: held[name] for name in names if name in held and not isinstance(held[name], types.ModuleType)}
    if not held:
        return _of_iterator(value)
    return (type(value).__qualname__, *((name, _state(item, depth - 1, names)) for name, item in [*held.items()][:_MOST]))


def _of_tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.nbytes <= _MOST_BYTES:
        return (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    return (id(tensor), tensor._version)


def _of_numpy(value: Any) -> Any:
    if hasattr(value, "tobytes"):
        return (str(getattr(value, "dtype", "")), value.tobytes())
    generator = getattr(value, "bit_generator", None)  # of a numpy.random.Generator
    if generator is not None:
        return repr(generator.state)
    if hasattr(value, "get_state"):
        return repr(value.get_state())
    return type(value).__qualname__


def _of_iterator(value: Any) -> Any:
    """An iterator's position, by itertools' repr and by length hints; it is not advanced."""
    text = repr(value) if getattr(type(value), "__module__", "") == "itertools" else ""
    return (type(value).__qualname__, text, operator.length_hint(value, -1) if hasattr(type(value), "__next__") else -1)
