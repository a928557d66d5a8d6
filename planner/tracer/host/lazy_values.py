"""Lazy values: plain values that the first call of a forward sets, and that later calls find (a mode, a flag, a shape).

Lists and dictionaries are left to the model's own first call: which other places hold the same one is not known.
transformers' image classifiers set `config.problem_type` from the labels, for example. Where a first and a second forward run
the same kernels, a planned first call is right, too, once it has set these values.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from planner.tracer.host.fingerprint import alike
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved
from planner.tracer.host.state import LazyValue, bare_fingerprint
from planner.tracer.host.values import ABSENT, is_plain


def lazy_values(model: nn.Module, settled: Mapping[Path, Any], written: Sequence[Path]) -> tuple[LazyValue, ...]:
    """What a first call sets; nothing where it also sets what is not plain: setting the rest would make it no first call.

    Args:
        model: in the state that a first call finds.
        settled: every place that the forward reads or writes, as later calls find it.
        written: places that every call writes.
    """
    found: list[LazyValue] = []
    for path, after in settled.items():
        if any(path.is_inside(other) for other in (*written, *(value.path for value in found))):
            continue
        before = path.get(model)
        if before is after or alike(bare_fingerprint(before), bare_fingerprint(after)):
            continue
        if not (is_plain(after) and (before is ABSENT or is_plain(before))):
            return ()
        if _is_held_in_place(model, path):
            found.append(LazyValue(path, bare_fingerprint(before), after))
    return tuple(found)


@contextlib.contextmanager
def values_set(model: nn.Module, lazy: Sequence[LazyValue]) -> Iterator[None]:
    """While entered, these values are set."""
    preserved = Preserved(guards_iterators=False)
    for value in lazy:
        if not value.path.steps and value.path.scope is not None:
            preserved.keep_variable(value.path.scope.variables, value.path.name)
        else:
            preserved.keep(_holder(model, value.path))
    try:
        for value in lazy:
            value.set(model)
        yield
    finally:
        preserved.restore()


def _holder(model: nn.Module, path: Path) -> Any:
    """The object or container that a value is written into."""
    if path.steps:
        return path.holder.get(model)
    return model.get_submodule(path.module)


def _is_held_in_place(model: nn.Module, path: Path) -> bool:
    """Whether the value is written into an object, a dictionary or a list, or is a global variable."""
    if path.steps:
        holder, kind = _holder(model, path), path.steps[-1][0]
        return isinstance(holder, (list, dict, deque)) if kind == "item" else kind == "attr" and not isinstance(holder, type)
    return path.scope is not None or path.name.isidentifier()
