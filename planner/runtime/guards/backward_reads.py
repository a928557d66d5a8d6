"""BackwardReads: whether code of the model's own that runs in the backward finds the Python state that the forward left.

A plan holds what this code computed from the state at the forward. In eager it reads the state that the backward finds.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner.errors import BackwardError
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, alike, first_difference
from planner.tracer.host.path import Path, named
from planner.tracer.host.scopes import Reads
from planner.tracer.host.state import HostKey, bare_fingerprint, walk
from planner.tracer.host.values import is_object, is_plain


@dataclass(frozen=True, slots=True)
class _Place:
    """What lies at a place.

    Attributes:
        value: what lies there, where nothing inside of it can change; else its fingerprint.
        is_fixed: which of the two.
        tensors: the tensors at and inside of it.
    """

    path: Path
    value: Any
    is_fixed: bool = False
    tensors: tuple[weakref.ref[torch.Tensor], ...] = ()

    @property
    def _print(self) -> Fingerprint:
        return bare_fingerprint(self.value) if self.is_fixed else self.value

    def difference(self, now: _Place) -> str:
        """What is otherwise now, in words; "" if nothing is."""
        if self.is_fixed and now.is_fixed and self.value is now.value:
            return ""
        before, after = self._print, now._print
        if not alike(before, after):
            found = first_difference(before, after, str(self.path))
            texts = f"is {found.now}, and was {found.planned}" if found.now != found.planned else "is not as it was"
            return f"{found.where} {texts} when the forward ended"
        same = [id(ref()) for ref in self.tensors] == [id(ref()) for ref in now.tensors]
        return "" if same else f"{self.path} holds another tensor than when the forward ended"


@dataclass(slots=True)
class CallReads:
    """The state as one call's forward left it; empty until then."""

    of: BackwardReads
    places: Sequence[_Place] = ()

    def note(self) -> None:
        """The forward has ended, and has left its state."""
        self.places = self.of.now()

    def check(self) -> None:
        """The backward begins.

        Raises:
            BackwardError: something is not as the forward left it; names it.
        """
        for then, now in zip(self.places, self.of.now() if self.places else (), strict=True):
            different = then.difference(now)
            if different:
                raise BackwardError(
                    f"{different}: it was changed before the backward, whose code (a hook or a Function of the model) reads "
                    "it. Change it before the forward or after the backward, or use the original model for this step"
                )


class BackwardReads:
    """Finds what code of the backward may read in the state of one model.

    Args:
        model: the model, or a copy of the one that was planned.
        key: what the forward and the code of the backward read.
    """

    def __init__(self, model: nn.Module, key: HostKey) -> None:
        self._model, self._modules = model, named(model)
        code, held = key.reads.backward_names, key.held_by_backward
        self._has_code = code is None or bool(code) or bool(held)
        by_name = Reads({}, code or frozenset(), backward_names=code)
        self._paths = [
            (path, key.reads if path in held else by_name)
            for path, _ in (key.expected if self._has_code else ())
            if path.name not in MODULE_HOOKS
            if code is None or path.name in code or path in held or is_object(path.root(model))
        ]

    def of_call(self) -> CallReads | None:
        """For one forward and its backward; None where no such code was found."""
        return CallReads(self) if self._has_code else None

    def now(self) -> list[_Place]:
        """Every place that it may read, as it is now."""
        return [self._at(path, reads) for path, reads in self._paths]

    def _at(self, path: Path, reads: Reads) -> _Place:
        root = path.root(self._model)
        if isinstance(root, torch.Tensor):
            return _Place(path, "a tensor", tensors=(weakref.ref(root),))
        if id(root) in self._modules or is_plain(root) or _is_fixed(root):
            return _Place(path, root, is_fixed=True)
        inside = walk(path, root, reads, self._modules, set())
        tensors = tuple(weakref.ref(value) for _, value in inside if isinstance(value, torch.Tensor))
        return _Place(
            path, path.fingerprint(self._model, Fingerprints(self._modules, reads.wants, frozenset())), tensors=tensors
        )


def _is_fixed(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return not value.__closure__ and not vars(value)
    return isinstance(value, (types.ModuleType, types.BuiltinFunctionType))
