"""Errors that say nothing about the model: faults of the planner's own code, and lack of memory.

A submodule that cannot be captured runs as it is. Neither of these is a reason for that: they reach the user as they are, with
a note of what the planner was doing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import torch

from planner.errors import GraphError, PlannerError, ScheduleError

_F = TypeVar("_F", bound=Callable[..., Any])

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|DefaultCPUAllocator|ALLOC_FAILED", re.IGNORECASE
)
"""In RuntimeErrors of torch's allocators and libraries that have no class of their own."""
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    StopIteration,
    TypeError,
    ValueError,
)
"""What Python raises where code is wrong. A RuntimeError is left out: torch's kernels raise it for what a trace cannot do."""
_USERS: set[CodeType] = set()


def calls_users_code(function: _F) -> _F:
    """Mark a function that is called in place of the user's code, or calls it: an error raised in its frame is the user's.

    What is called there may be written in C (an attribute's descriptor, a function that is given too many arguments), and has
    no frame of its own.
    """
    _USERS.add(function.__code__)
    return function


def is_out_of_memory(error: BaseException) -> bool:
    """The host or the device has not the memory for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def is_fault(error: BaseException) -> bool:
    """A mistake in the planner's code: one that a line of this package raised, or a graph or schedule that it got wrong."""
    if isinstance(error, PlannerError):
        return isinstance(error, (GraphError, ScheduleError))
    return isinstance(error, _MISTAKES) and _raised_here(error)


def concerns_model(error: BaseException) -> bool:
    """The error says something about the model; else it is to reach the user as it is."""
    return not is_fault(error) and not is_out_of_memory(error)


def note(error: BaseException, doing: str) -> None:
    """Add to an error that does not concern the model what the planner was doing ("capturing Net").

    It has one such note, of the innermost place.
    """
    if concerns_model(error) or any(text.startswith(_NOTE) for text in getattr(error, "__notes__", ())):
        return
    if is_out_of_memory(error):
        error.add_note(f"{_NOTE} {doing}, which needs more memory than is free")
    else:
        error.add_note(
            f"{_NOTE} {doing}. This is its own fault, not the model's, which is as it was: please report this traceback, "
            "and train unplanned until it is fixed"
        )


@contextlib.contextmanager
def noting(doing: str) -> Iterator[None]:
    """Errors that do not concern the model leave with a note; see `note`."""
    try:
        yield
    except Exception as error:
        note(error, doing)
        raise


_NOTE = "The planner was"


def _raised_here(error: BaseException) -> bool:
    """The innermost frame is one of this package's, and not in place of the user's code."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    code = None if last is None else last.tb_frame.f_code
    return code is not None and code.co_filename.startswith(_PACKAGE) and code not in _USERS
