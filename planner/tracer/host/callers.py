"""Whose call a frame is: the user's, this package's, or of a part of torch that manages random generators itself."""

from __future__ import annotations

import types
from pathlib import Path

import torch

from planner.tracer.host.scopes import PACKAGE, is_library_code

_COMPILER = str(Path(torch.__file__).parent / "_dynamo")
_CHECKPOINT = str(Path(torch.__file__).parent / "utils" / "checkpoint.py")


def is_users(frame: types.FrameType | None) -> bool:
    """The call is no library's."""
    return frame is not None and not is_library_code(frame.f_code)


def is_ours(frame: types.FrameType) -> bool:
    """The call is this package's own: it saves generators' states itself."""
    return _is_called_by(frame, PACKAGE, 4)


def is_compilers(frame: types.FrameType) -> bool:
    """The call is torch's compiler's: it saves the states of Python's and numpy's generators, and puts them back."""
    return _is_called_by(frame, _COMPILER, 40)


def is_checkpoints(frame: types.FrameType) -> bool:
    """The call is activation checkpointing's, which saves generators' states and sets them again."""
    return _is_called_by(frame, _CHECKPOINT, 6)


def _is_called_by(frame: types.FrameType, package: str, most: int) -> bool:
    """Code of this package is among the callers, with libraries' code alone in between."""
    caller: types.FrameType | None = frame
    for _ in range(most):
        if caller is None:
            return False
        if caller.f_code.co_filename.startswith(package):
            return True
        if not is_library_code(caller.f_code):
            return False
        caller = caller.f_back
    return False
