"""Calls of submodules, intercepted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


def is_compiled_in_place(module: nn.Module) -> bool:
    """The module runs what its own `compile()` made."""
    return module._compiled_call_impl is not None


@contextlib.contextmanager
def calls_intercepted(
    modules: Mapping[nn.Module, str], handle: Callable[[nn.Module, str, Any, Any, Callable[[], Any]], Any]
) -> Iterator[None]:
    """While entered, `module(*args, **kwargs)` of the outermost of `modules` is `handle(module, name, args, kwargs, run)`.

    `run()` makes the call as it would have been. As fx's own tracer does, by way of nn.Module's `__call__`.
    """
    call = nn.Module.__call__
    inside = False
    thread = threading.get_ident()

    def intercepted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or threading.get_ident() != thread or self not in modules:
            return call(self, *args, **kwargs)
        inside = True
        try:
            return handle(self, modules[self], args, kwargs, lambda: call(self, *args, **kwargs))
        finally:
            inside = False

    nn.Module.__call__ = intercepted  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]
