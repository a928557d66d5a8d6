"""Iterators while the planner runs a model itself: reading the real one would use it up."""

from __future__ import annotations

import contextlib
import copy
import io
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from planner.errors import CaptureError
from planner.kernels.calls import like
from planner.tracer.faults import calls_users_code
from planner.tracer.host.values import is_iterator

_READS_COPIES: ContextVar[bool] = ContextVar("reads_copies", default=False)


@contextlib.contextmanager
def iterators_copied() -> Iterator[None]:
    """Guarded iterators may be read inside, by opaque modules and operators: they get the items of a copy."""
    token = _READS_COPIES.set(True)
    try:
        yield
    finally:
        _READS_COPIES.reset(token)


class GuardedIterator:
    """Replaces an iterator while the planner runs the model itself, so that the real iterator is not advanced."""

    def __init__(self, held: Any, where: str) -> None:
        self.held, self.where = held, where
        self._copy: Any = None

    def __iter__(self) -> Iterator[Any]:
        return self

    @calls_users_code
    def __next__(self) -> Any:
        if _READS_COPIES.get():
            if self._copy is None:
                self._copy = self._copied()
            return next(self._copy)
        raise CaptureError(
            f"the model's forward reads an iterator ({self.where}, a {type(self.held).__name__}), which gives another item at "
            "each call; a plan would repeat one for ever. Pass the item to the model as an argument"
        )

    def send(self, _value: Any) -> Any:
        """As a generator's: refused as `next` is; a generator cannot be copied."""
        return next(self)

    def _copied(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.14 no longer copies those of itertools
                return copy.deepcopy(self.held)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise CaptureError(
                f"the model's forward reads an iterator ({self.where}, a {type(self.held).__name__}), which cannot be copied, "
                "so that planning would use it up. Pass the item to the model as an argument"
            ) from error


def guarded(value: Any, where: str) -> Any:
    """A guard in the place of an iterator or of its method; a tuple with guards in their places; any other value itself."""
    if is_used_up(value):
        return GuardedIterator(value, where)
    if isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)) and is_used_up(value.__self__):
        return getattr(GuardedIterator(value.__self__, where), value.__name__, value)
    if isinstance(value, tuple):
        items = [guarded(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if any(item is not own for item, own in zip(items, value, strict=True)):
            return like(value, items)
    return value


def guard_in_place(value: Any, where: str, put: Callable[[Any], object]) -> None:
    """Give `put` a guard for a value that is, or holds, an iterator: it writes the guard to where the value is held."""
    if (guard := guarded(value, where)) is not value:
        put(guard)


def is_used_up(value: Any) -> bool:
    """Reading the value advances it, and nothing else tells how far it is."""
    return is_iterator(value) and not isinstance(value, (GuardedIterator, io.IOBase))
