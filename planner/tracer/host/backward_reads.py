"""What code of the model's own that runs in the backward reads, and what of that no plan can compare."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from planner._compat.private_names import HOOK_ATTRIBUTES, MODULE_HOOKS
from planner.errors import CaptureError
from planner.tracer.host.backward_code import BackwardCode, LeftOut
from planner.tracer.host.path import Path
from planner.tracer.host.state import HostKey
from planner.tracer.host.values import is_object, own_class, reachable
from planner.tracer.libraries import is_users_hook


class ReadsOfBackward:
    """What code of the backward may read, gathered over the runs of a forward.

    Attributes:
        names: attributes that it names, of any object; None: of any name.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] | None = frozenset()
        self._noted: set[Any] = set()
        self._held: dict[int, Any] = {}  # with the values, so that no identity is used twice

    def new_run(self) -> None:
        """The forward runs again, and may find other state."""
        self._noted.clear()

    def is_noted(self, code: BackwardCode, modules: Collection[int]) -> bool:
        """Whether such code was met in this run: the same functions, which hold nothing but modules of the model. Notes it.

        Each of many equal layers makes its own.
        """
        key = frozenset((function.__code__, id(function.__globals__)) for function in code.functions.values())
        if not all(held in modules for held in code.held):
            return False
        is_noted = key in self._noted
        self._noted.add(key)
        return is_noted

    def add(self, code: BackwardCode, modules: Collection[int]) -> None:
        """Add what some code names and holds; what lies in the model's modules (identities) it has to name."""
        self.names = None if self.names is None or code.names is None else self.names | code.names
        held = (value for value in reachable(code.held.values(), modules) if own_class(value) is not None or is_object(value))
        self._held |= {id(value): value for value in held}

    def held_in(self, paths: Sequence[Path], model: nn.Module, modules: Collection[int]) -> tuple[Path, ...]:
        """The places that are, or lead to, containers and objects that it holds, under whatever name."""
        is_held = lambda path: any(id(inner) in self._held for inner in reachable([path.root(model)], modules))
        return tuple(filter(is_held, dict.fromkeys(paths))) if self._held else ()

    def may_read(self, paths: Sequence[Path], model: nn.Module) -> bool:
        """Whether it names or holds one of these places."""
        modules = set(map(id, model.modules()))
        return any(self.names is None or path.name in self.names for path in paths) or bool(self.held_in(paths, model, modules))

    def holds_one_of(self, identities: Collection[int]) -> bool:
        """Whether it holds one of these containers and objects."""
        return not self._held.keys().isdisjoint(identities)


def refuse_left_out(found: Mapping[LeftOut, str], reads: ReadsOfBackward, arguments: Collection[int]) -> None:
    """Raise CaptureError for the first of these; each has the name of the submodule that prepared it, "" for the model.

    Args:
        reads: what the code holds.
        arguments: identities of lists, dictionaries and objects among the call's arguments.
    """
    found = {**found, **({LeftOut.ARGUMENTS: ""} if reads.holds_one_of(arguments) else {})}
    kind, where = next(iter(found.items()), (None, ""))
    if kind is not None:
        raise CaptureError(kind.value.format(where or "the model"), module=where)


def refuse_reads_of_own_hooks(model: nn.Module, names: Collection[str]) -> None:
    """Raise CaptureError where the forward reads lists of hooks, and the model has hooks: in the recorded call it has none.

    Args:
        names: attributes that the code which ran may read.
    """
    read = sorted(HOOK_ATTRIBUTES.intersection(names))
    if read and any(is_users_hook(hook) for kind in MODULE_HOOKS for hook in vars(model)[kind].values()):
        raise CaptureError(
            f"the model's forward reads its list of hooks ({read[0]}), which a plan finds empty: its hooks run around the "
            "planned call. Remove the hooks, or ask for something else"
        )


def refuse_reads_of_written(key: HostKey) -> None:
    """Raise CaptureError where code of the backward names or holds what the forward leaves in Python state.

    It would read what the forward left last, and a plan holds what one forward left.
    """
    names, held = key.reads.backward_names, key.held_by_backward
    path = next((path for path in key.left if names is None or path.name in names or path in held), None)
    if path is not None:
        raise CaptureError(
            f"the model's forward writes {path}, which code of the model's own that runs in the backward may read (a hook, an "
            "autograd.Function): a plan would read what one call left. Keep it in a local variable for that code",
            module=path.module,
        )
