"""BackwardGuard: whether Python code that a planned step runs in the backward finds the state that the forward left.

Of hooks and Functions of the model, a plan holds what they computed from the state at the forward; in eager they read the state
that the backward finds. So where there is such code, nothing that forward or backward read may be changed in between. It reads
nothing that the forward writes (`refuse_reads_of_written`).

A submodule that runs as it is, and again in the backward, has to find what it found in the forward: its attributes, those of
its submodules and of their classes, and the global variables that it may use. Hooks for all modules are none of either: a call
that finds one runs unplanned.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat.switches import has_global_hooks
from planner.errors import BackwardError, first_line
from planner.kernels import custom
from planner.runtime.guards.model_state import ModelStateGuard
from planner.runtime.step import RewrittenStep
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, Same, alike, first_difference
from planner.tracer.host.foreign import is_foreign_class
from planner.tracer.host.path import Path, named
from planner.tracer.host.scopes import Reads, is_library_code
from planner.tracer.host.state import walk
from planner.tracer.host.values import class_homes, is_plain

Tensors = tuple[tuple[weakref.ref[torch.Tensor], int], ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What lies at a place.

    Attributes:
        fingerprint: None where the place is compared with the plan.
        tensors: the tensors at and inside of it, with their versions.
    """

    fingerprint: Fingerprint
    tensors: Tensors = ()


_GONE = _Found(("absent",))


def _difference(path: Path, then: _Found, now: _Found) -> str:
    """What is otherwise now, in words; "" if nothing is."""
    if not alike(then.fingerprint, now.fingerprint):
        found = first_difference(then.fingerprint, now.fingerprint, str(path))
        return f"{found.where} is {found.now}, and was {found.planned}"
    same = [(id(ref()), version) for ref, version in then.tensors] == [(id(ref()), version) for ref, version in now.tensors]
    return "" if same else f"{path} holds another tensor, or was written into"


@dataclass(slots=True)
class StateAtForward:
    """The state as one call's forward left it."""

    guard: BackwardGuard
    found: Mapping[Path, _Found] | None = None
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
                f"{different}: it was changed between the forward and its backward, which may read it (in a hook or a Function "
                "of the model, or in a submodule that it runs again). Change it before the forward or after the backward, or "
                "use the original model for this step"
            )


class BackwardGuard:
    """Compares what Python code in the backward may read in the state of one model.

    Args:
        model: the model, or a copy of the one that was planned.
        step: the planned step.
        state: compares what the forward does not write with the plan.
    """

    def __init__(self, model: nn.Module, step: RewrittenStep, state: ModelStateGuard) -> None:
        host = step.joint.host
        self._model, self._reads, self._is_first = model, host.key.reads, host.as_found
        self._state, self._modules = state, named(model)
        self._parts = _run_again(step)
        names, held = host.key.reads.backward_names, host.key.held_by_backward
        self._has_code = names is None or bool(names) or bool(held)
        self._modes = names is None or "training" in names
        is_read = lambda path: names is None or path.name in names or path in held
        paths = [path for path, _ in host.key.expected if is_read(path)] if self._has_code else []
        self._paths = [path for path in paths if self._is_first or self._tensors(path)]

    def of_call(self) -> StateAtForward | None:
        """For one forward and its backward; None where no such code was found."""
        return StateAtForward(self) if self._has_code or self._parts else None

    def found(self) -> dict[Path, _Found]:
        """The tensors in the places that hooks and Functions read, and all that submodules which run again may read.

        After a first call, which changes what it finds, all that lies in the former places.
        """
        prints = Fingerprints(self._modules, self._reads.wants)
        print_ = prints.of if self._is_first else lambda _: None
        return {path: _Found(print_(path.get(self._model)), self._tensors(path)) for path in self._paths} | self._of_parts()

    def difference(self, then: Mapping[Path, _Found]) -> str:
        """The first place that is not as the forward left it, in words; "" if there is none."""
        changed = self._state.change(modes=self._modes) if self._has_code and not self._is_first else None
        if changed is not None:
            return changed.text or f"{changed.where} is {changed.now}, and was {changed.planned}"
        if self._parts and has_global_hooks():
            return "a hook for all modules is registered, and none was"
        now = self.found()
        texts = (_difference(path, then.get(path, _GONE), now.get(path, _GONE)) for path in {**then, **now})
        return next(filter(None, texts), "")

    def _tensors(self, path: Path, reads: Reads | None = None) -> Tensors:
        value = path.get(self._model)
        if is_plain(value) or (id(value) in self._modules and isinstance(value, nn.Module)):
            return ()
        inside = walk(path, value, reads or self._reads, self._modules, set())
        return tuple((weakref.ref(item), item._version) for _, item in inside if isinstance(item, torch.Tensor))

    def _of_parts(self) -> dict[Path, _Found]:
        """What submodules that run again hold, their classes included, and the global variables that they may use."""
        if not self._parts:
            return {}
        inside = [(name, module) for name, module in self._model.named_modules() if f"{name}.".startswith(self._parts)]
        paths = [*(path for name, module in inside for path in _own(name, module)), *_of_classes(inside)]
        scopes = self._reads.opaque_scopes
        paths += [Path(scope.where, name, scope=scope) for scope in scopes for name in scope.names if name in scope.variables]
        prints, known = Fingerprints(self._modules, _EVERYTHING.wants), dict[int, _Found]()
        found = {}
        for path in paths:
            value = path.root(self._model)
            if id(value) not in known:  # submodules share their settings
                is_whole = _is_whole(value)
                print_ = Same(value, type(value).__qualname__, True) if is_whole else prints.of(value)
                known[id(value)] = _Found(print_, () if is_whole else self._tensors(path, _EVERYTHING))
            found[path] = known[id(value)]
        return found


def _own(name: str, module: nn.Module) -> Iterator[Path]:
    """Where a submodule holds state of its own."""
    for attribute, value in vars(module).items():
        if attribute not in _GIVEN_AS_INPUTS and (attribute not in _OF_EVERY_MODULE or isinstance(value, bool) or value):
            yield Path(name, attribute)


def _of_classes(inside: Sequence[tuple[str, nn.Module]]) -> Iterable[Path]:
    """Methods and other attributes of the modules' classes, each by one module that has none of its own of that name."""
    found: dict[tuple[type, str], Path] = {}
    for name, module in inside:
        for base in class_homes(type(module)):
            if not is_foreign_class(base):
                for attribute in vars(base).keys() - vars(module).keys() - _OF_EVERY_CLASS:
                    found.setdefault((type(module), attribute), Path(name, attribute))
    return found.values()


_GIVEN_AS_INPUTS = frozenset(("_parameters", "_buffers"))
"""Of a submodule that runs as it is: its tensors are those of the forward, also where it runs again."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Most of these are empty: dictionaries of hooks."""
_OF_EVERY_CLASS = frozenset(vars(type("Empty", (nn.Module,), {}))) | {"__annotations__"}
_EVERYTHING = Reads({}, frozenset(), backward_names=None)


def _is_whole(value: Any) -> bool:
    """What belongs to a library, and Python modules, are compared as a whole: they hold thousands of things."""
    if isinstance(value, types.FunctionType):
        return is_library_code(value.__code__)
    return isinstance(value, (types.ModuleType, types.BuiltinFunctionType)) or (
        isinstance(value, type) and is_foreign_class(value)
    )


def _run_again(step: RewrittenStep) -> tuple[str, ...]:
    """Names, each with a dot behind it, of the submodules that run as they are and that the backward runs again."""
    calls = step.joint.opaque_calls
    again = (node for node in step.partitioned.backward.nodes if node.target is custom.opaque_forward)
    return tuple(dict.fromkeys(f"{calls[str(node.args[0])].module}." for node in again))
