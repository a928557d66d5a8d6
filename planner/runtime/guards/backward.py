"""BackwardGuard: whether code of the model's own that runs in the backward finds the Python state that the forward left.

A plan holds what this code computed from the state at the forward. In eager it reads the state that the backward finds. So
where there is such code, nothing that forward or backward read may be changed in between. It reads nothing that the forward
writes (`refuse_reads_of_written`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass

import torch
from torch import nn

from planner.errors import BackwardError, first_line
from planner.runtime.guards.model_state import ModelStateGuard
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, alike, first_difference
from planner.tracer.host.path import Path, named
from planner.tracer.host.state import HostState, walk
from planner.tracer.host.values import is_plain

Tensors = tuple[tuple[weakref.ref[torch.Tensor], int], ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What lay at a place.

    Attributes:
        fingerprint: None where the place is compared with the plan.
        tensors: the tensors at and inside of it, with their versions.
    """

    path: Path
    fingerprint: Fingerprint
    tensors: Tensors

    def difference(self, now: _Found) -> str:
        """What is otherwise now, in words; "" if nothing is."""
        if not alike(self.fingerprint, now.fingerprint):
            found = first_difference(self.fingerprint, now.fingerprint, str(self.path))
            return f"{found.where} is {found.now}, and was {found.planned}"
        same = [(id(ref()), version) for ref, version in self.tensors] == [(id(ref()), version) for ref, version in now.tensors]
        return "" if same else f"{self.path} holds another tensor, or was written into"


@dataclass(slots=True)
class StateAtForward:
    """The state as one call's forward left it."""

    guard: BackwardGuard
    found: Sequence[_Found] | None = None
    context: Context | None = None
    thread: int = 0

    def note(self) -> None:
        """The forward has ended, and has left its state."""
        self.found, self.context, self.thread = self.guard.found(), copy_context(), threading.get_ident()

    def check(self) -> None:
        """The backward begins, maybe in another thread.

        Raises:
            BackwardError: something is not as the forward left it; names it.
        """
        if self.found is None or self.context is None:
            return
        try:
            # autograd's own threads have no context variables
            is_here = threading.get_ident() == self.thread
            different = (copy_context() if is_here else self.context).run(self.guard.difference, self.found)
        except Exception as error:  # a submodule is gone, an object of the user's raises
            different = f"what it reads could not be compared ({first_line(error)})"
        if different:
            raise BackwardError(
                f"{different}: it was changed between the forward and its backward, whose code (a hook or a Function of the "
                "model) may read it. Change it before the forward or after the backward, or use the original model for this "
                "step"
            )


class BackwardGuard:
    """Compares what code of the backward may read in the state of one model.

    Args:
        model: the model, or a copy of the one that was planned.
        host: what forward and backward read and write.
        state: compares what the forward does not write with the plan.
    """

    def __init__(self, model: nn.Module, host: HostState, state: ModelStateGuard) -> None:
        self._model, self._reads, self._is_first = model, host.key.reads, host.as_found
        self._state, self._modules = state, named(model)
        names, held = host.key.reads.backward_names, host.key.held_by_backward
        self._has_code = names is None or bool(names) or bool(held)
        self._modes = names is None or "training" in names
        is_read = lambda path: names is None or path.name in names or path in held
        paths = [path for path, _ in host.key.expected if is_read(path)] if self._has_code else []
        self._paths = [path for path in paths if self._is_first or self._tensors(path)]

    def of_call(self) -> StateAtForward | None:
        """For one forward and its backward; None where no such code was found."""
        return StateAtForward(self) if self._has_code else None

    def found(self) -> list[_Found]:
        """The tensors in the places that are read; after a first call, which changes what it finds, all that lies there."""
        prints = Fingerprints(self._modules, self._reads.wants, frozenset())
        print_ = prints.of if self._is_first else lambda _: None
        return [_Found(path, print_(path.get(self._model)), self._tensors(path)) for path in self._paths]

    def difference(self, then: Sequence[_Found]) -> str:
        """The first place that is not as the forward left it, in words; "" if there is none."""
        changed = None if self._is_first else self._state.change(modes=self._modes)
        if changed is not None:
            return changed.text or f"{changed.where} is {changed.now}, and was {changed.planned}"
        return next((text for before, now in zip(then, self.found(), strict=True) if (text := before.difference(now))), "")

    def _tensors(self, path: Path) -> Tensors:
        value = path.get(self._model)
        if is_plain(value) or (id(value) in self._modules and isinstance(value, nn.Module)):
            return ()
        inside = walk(path, value, self._reads, self._modules, set())
        return tuple((weakref.ref(item), item._version) for _, item in inside if isinstance(item, torch.Tensor))
