"""Kernels that communicate with other processes: which they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from planner._torch import InPlaceCollectiveError, TorchDispatchMode
from planner.errors import InputError
from planner.profiler.observed import observation_of

_NAMESPACES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor"})


class Refusing(TorchDispatchMode):
    """In a real forward, run to learn what a trace cannot know: refuses collectives that no plan can hold.

    Those are the ones that write in place; and all of them where submodules run as they are, because these are run several
    times, and not equally often on every rank.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space = getattr(func, "namespace", "")
        if space == "c10d":
            raise InPlaceCollectiveError(str(func))
        if space in _NAMESPACES and self._parts:
            raise InputError(
                f"the model communicates ({func}) and has submodules that run as they are ({', '.join(self._parts)}), which no "
                "plan of it can hold: plan submodules that do not communicate"
            )
        return func(*args, **(kwargs or {}))


def is_collective(node: fx.Node) -> bool:
    """The kernel, or the wait for its result, takes part in communication that other ranks take part in, too."""
    if getattr(node.target, "namespace", "") in _NAMESPACES:
        return True
    found = observation_of(node)
    return found is not None and found.communicates
