"""The user's own code among the frames that run: the lines that messages and plans name."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from planner.graph.source import Source

_PACKAGE = str(Path(__file__).parent.parent)
CALLER = str(Path(__file__).with_name("capture.py"))
"""The file that calls the model: frames further out are not the model's."""
CALLERS = (CALLER, str(Path(__file__).with_name("eager.py")))
"""All files that call it."""
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTIONS = str(Path(torch.__file__).parent / "distributions")
_STDLIB = str(Path(functools.__file__).parent)


def source_here(module: str) -> tuple[Source, bool]:
    """The innermost running frame of the model's own code, and whether it runs torch.distributions.

    Frames of torch, of the standard library and of this package are left out. Where only these run, the note of the Source is
    the class of the innermost torch module.

    Args:
        module: qualified name of the submodule that runs.

    Returns:
        (the source, whether torch.distributions runs in it)
    """
    frame: FrameType | None = sys._getframe(1)
    inside_torch, is_distribution = "", False
    while frame is not None and frame.f_code.co_filename not in CALLERS:
        file = frame.f_code.co_filename
        if is_users(file):
            return Source(module, Path(file).name, frame.f_lineno), is_distribution
        is_distribution = is_distribution or file.startswith(_DISTRIBUTIONS)
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" and not inside_torch else None
        if isinstance(owner, nn.Module) and file.startswith(_TORCH):
            inside_torch = type(owner).__name__
        frame = frame.f_back
    return Source(module, note=inside_torch), is_distribution


def is_users(file: str) -> bool:
    """A source file of the user's, or of a library other than torch, the standard library and this package."""
    if file.startswith((_TORCH, _PACKAGE, "<")):
        return file.startswith("<ipython")
    return not file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file
