"""What an exception in a trace means to the user: a CaptureError with the user's own line, and nothing of torch's internals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from planner._compat.fake_tensors import DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException
from planner.errors import CaptureError
from planner.graph.source import NOWHERE, Source
from planner.tracer.user_code import CALLER, is_users

_INTERNAL = re.compile(
    r"fake ?tensor|functional ?tensor|proxy|\baot|functionaliz|functorch|dispatch|tensor subclass|dynamo|torch\._"
    r"|\btrac(e|ing)\b|symint|symbool|symbolic|HigherOrderOperator|graph module|\bfx\b|saved tensor hooks"
    r"|<[\w.]+ object at 0x|please (open|file|report)|layout_impl|shape_env|Sparse\w+Backward|\w+TensorImpl\b",
    re.IGNORECASE,
)
"""Words of the machinery that traces, in messages of torch's."""

_MEANINGS = (
    (
        r"'(?:FunctionalTensor|FakeTensor)' object has no attribute '(\w+)'",
        "reads the attribute {} that was set on a tensor, which a plan does not follow: keep it on the module",
    ),
    (
        r"\.numpy\(\)|data pointer|data_ptr|python object",
        "reads a tensor's memory (numpy, data_ptr, copy.deepcopy), which a trace does not have: compute it with torch, or put "
        "it into a submodule of its own, which then runs as it is",
    ),
    (
        r"mutation on a view chain",
        "writes into a tensor by way of as_strided (fill_diagonal_ does so, too), which no trace can follow where that tensor "
        "is a view: write into a copy (clone())",
    ),
    (r"shape_env", "makes a tensor whose shape depends on the data, as nested tensors do; a plan needs fixed shapes"),
    (
        r"layout_impl|Sparse\w+Backward|\w+TensorImpl\b",
        "uses a tensor that is not dense (sparse, nested, mkldnn's), which a plan cannot hold: put what uses it into a "
        "submodule of its own, which then runs as it is",
    ),
    (r"dynamo-optimized|torch\.compile", "runs what torch.compile made: plan the module that was given to torch.compile"),
    (r"HigherOrderOperator", "uses a control-flow operator (torch.cond, while_loop, ...), which cannot be planned"),
    (
        r"saved tensor hooks|torch\.func|functorch|vmap|batched",
        "uses a function transform (torch.func), which cannot be planned",
    ),
    (
        r"convert all Tensors to FakeTensors",
        "uses a tensor that is neither a parameter, a buffer nor an argument in a way that cannot be traced: make it a buffer",
    ),
    (r"meta tensor|no data", "needs the data of a tensor that has none (device meta)"),
)
_LONGEST = 300


def capture_error(error: Exception, where: Source, *, is_models_own: bool = False) -> CaptureError:
    """The CaptureError for an exception that a real forward, or a trace, ended with.

    Args:
        where: source of the kernel called last.
        is_models_own: the model raises it without the planner, too.
    """
    line = _own_line(error.__traceback__)
    place = replace(line, module=where.module) if line else where
    at = f" at {place}" if place else ""
    if is_models_own and "HigherOrderOperator" not in str(error):  # for these, torch asks our modes for rules
        text = f"correct the model or the example call: model(*args, **kwargs){at} {own_words(error)}"
        return CaptureError(text, module=where.module, is_models_own=True)
    if isinstance(error, DynamicOutputShapeException):
        text = (
            f"{error.func}{at} makes a tensor whose shape depends on the data; a plan needs fixed shapes. Rewrite it with a "
            "mask, or put it into a submodule of its own, which then runs as it is"
        )
    elif isinstance(error, (DataDependentOutputException, UnsupportedOperatorException)):
        text = f"{error.func}{at} depends on tensor values in a way that cannot be captured"
    else:
        text = f"the model cannot be captured: its forward{at} {_meaning(error)}"
    return CaptureError(text, module=where.module)


def own_words(error: Exception) -> str:
    """'raises KeyError: ...' for an exception of the user's own code, run as it is."""
    message = " ".join(str(error).split())
    shown = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 4]} ..."
    return f"raises {type(error).__name__}: {shown}" if shown else f"raises {type(error).__name__}"


def _meaning(error: Exception) -> str:
    """What the forward does, as the end of a sentence."""
    message = " ".join(str(error).split())
    name = type(error).__name__
    is_internal = _INTERNAL.search(message) or (not message and name == "AssertionError")
    names_fakes = re.search(r"FunctionalTensor|FakeTensor", message)
    if not names_fakes and (_raised_by_user(error.__traceback__) or not is_internal):
        return own_words(error)
    for pattern, meaning in _MEANINGS:
        found = re.search(pattern, message, re.IGNORECASE)
        if found:
            return meaning.format(*found.groups())
    return f"does something that cannot be traced ({name})"


def _own_line(traceback: TracebackType | None) -> Source:
    """File and line of the innermost frame of the user's own code; NOWHERE where there is none."""
    line, inside = NOWHERE, False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        # frames up to the call of the model are those that called the planner's functions
        inside = inside or code.co_filename == CALLER
        if inside and is_users(code.co_filename):
            line = Source(file=Path(code.co_filename).name, line=traceback.tb_lineno)
        traceback = traceback.tb_next
    return line


def _raised_by_user(traceback: TracebackType | None) -> bool:
    """The innermost frame is the user's own: the message is, too."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and is_users(traceback.tb_frame.f_code.co_filename)
