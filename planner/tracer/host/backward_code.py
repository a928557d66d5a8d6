"""Code of the model's own that runs in the backward: of hooks on activations, of Functions, of hooks on saved tensors.

Recorded forwards have no backward. What this code may read is found in what it is made of: the names in it, the variables and
modules that it holds, and the functions that these names stand for.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch

from planner.errors import CaptureError
from planner.tracer.host.scopes import global_names, is_library_code
from planner.tracer.host.values import ABSENT, find_in_class, own_class, reachable

_SAVED_TENSORS = id(torch.autograd.graph.saved_tensors_hooks.__init__.__code__)
_GIVEN = {
    id(torch.autograd.Function.apply.__func__.__code__): ("cls",),  # type: ignore[attr-defined]
    id(torch.Tensor.register_hook.__code__): ("hook",),
    id(torch.Tensor.register_post_accumulate_grad_hook.__code__): ("hook",),
    id(torch.autograd.graph.register_multi_grad_hook.__code__): ("fn",),
    _SAVED_TENSORS: ("pack_hook", "unpack_hook"),
}
"""Functions of torch's that are given such code, by identity: names of these arguments."""
_ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))
_READ_ANY_NAME = frozenset(("getattr", "attrgetter", "vars", "__dict__", "__getattribute__", "eval", "exec"))
"""With these, code reads attributes whose names it need not hold."""
_TABLES = (dict, list, tuple)
"""Code may call functions that such variables hold."""
_OF_FUNCTIONS = ("backward", "vjp")
"""Methods of a torch.autograd.Function."""


class LeftOut(Enum):
    """What a forward prepares for the backward and no plan repeats: why, and what to do; {0} stands for who does it."""

    NODE_HOOK = (
        "the forward of {0} registers a hook on a node of autograd's graph (grad_fn.register_hook), whose code a plan cannot "
        "know. Register it on the tensor: tensor.register_hook"
    )
    RETAINED_GRADIENT = (
        "the forward of {0} keeps the gradient of an activation (retain_grad), which a plan returns to no one. Return the "
        "activation from the model, and call retain_grad() on it there"
    )
    ENVIRONMENT = (
        "code of {0} that runs in the backward reads environment variables, which a plan cannot compare. Read them in the "
        "forward"
    )
    SAVED_TENSORS = (
        "the forward of {0} packs or changes what is saved for the backward (torch.autograd.graph.saved_tensors_hooks), which "
        "a plan would leave out: it keeps what it needs itself. Do it around the call of the model, or not at all"
    )


def refuse_left_out(found: Mapping[LeftOut, str]) -> None:
    """Raise CaptureError for the first of these; each has the name of the submodule that prepared it, "" for the model."""
    kind, where = next(iter(found.items()), (None, ""))
    if kind is not None:
        raise CaptureError(kind.value.format(where or "the model"), module=where)


@dataclass(slots=True)
class BackwardCode:
    """Functions that run in the backward: those that torch is given, and those that they call by their names.

    Attributes:
        functions: by identity.
        held: values of their closures and defaults, and the objects that they are methods of.
        left_out: what no plan repeats of it.
    """

    left_out: set[LeftOut] = field(default_factory=set)
    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    @property
    def codes(self) -> dict[types.CodeType, dict[str, Any]]:
        """Their code, with their global variables."""
        return {code: of.__globals__ for of in self.functions.values() for code in codes_in(of.__code__)}

    @property
    def _co_names(self) -> frozenset[str]:
        return frozenset(name for code in self.codes for name in code.co_names)

    @property
    def names(self) -> frozenset[str] | None:
        """Attributes that they may read: those that they name, in texts, too; None: of any name."""
        found = self._co_names
        if found & _READ_ANY_NAME:
            return None
        return found.union(*(_texts(code.co_consts) for code in self.codes))

    def add(self, value: Any) -> None:
        """Add a function, method or callable object, and what it calls, unless it is a library's."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if isinstance(value, partial):
            self.held += [*value.args, *value.keywords.values()]
            self.add(value.func)
        elif isinstance(value, types.MethodType):
            self.held.append(value.__self__)
            self.add(value.__func__)
        elif isinstance(value, types.FunctionType):
            if not is_library_code(value.__code__) and id(value) not in self.functions:
                self._add_function(value)
        elif not isinstance(value, type) and value is not ABSENT and callable(value):
            self.held.append(value)
            called = find_in_class(type(value), "__call__")
            if isinstance(called, types.FunctionType):  # Python's own callables have one without end
                self.add(called)

    def _add_function(self, function: types.FunctionType) -> None:
        self.functions[id(function)] = function
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self.held += [*cells, *defaults]
        codes = list(codes_in(function.__code__))
        called = [function.__globals__.get(name) for code in codes for name in global_names(code)]
        for value in (*called, *cells):
            for inner in (value, *reachable([value])) if isinstance(value, _TABLES) else (value,):
                if isinstance(inner, types.FunctionType):
                    self.add(inner)

    def add_methods(self, modules: Collection[int], classes_of_model: Callable[[], Collection[type]]) -> None:
        """Add the methods of what these functions hold, and of all that this leads to, whose names are in their code.

        Args:
            modules: identities of the model's modules; from one of them on, everything in the model may be reached.
            classes_of_model: classes of that.
        """
        known = -1
        while known < len(self.functions):
            known, names = len(self.functions), self.names
            reached = list(reachable(self.held, modules))
            classes = {type(value) for value in reached}
            if any(id(value) in modules for value in reached):
                classes.update(classes_of_model())
            for kind in classes:
                for name in {name for base in kind.__mro__ for name in vars(base)} if names is None else names | {"__call__"}:
                    method = find_in_class(kind, name)
                    if isinstance(method, (types.FunctionType, staticmethod, classmethod, property)):
                        self.add(method)
        if self._co_names & _ENVIRONMENT:
            self.left_out.add(LeftOut.ENVIRONMENT)


class ReadsOfBackward:
    """What code of the backward may read, gathered over the runs of a forward.

    Attributes:
        names: attributes that it names, of any object; None: of any name.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] | None = frozenset()
        self._containers: dict[int, Any] = {}  # with the values, so that no identity is used twice

    def add(self, code: BackwardCode, modules: Collection[int]) -> None:
        """Add what some code names and holds; what lies in the model's modules (identities) it has to name."""
        self.names = None if self.names is None or code.names is None else self.names | code.names
        containers = (value for value in reachable(code.held, modules) if own_class(value) is not None)
        self._containers |= {id(value): value for value in containers}

    def holds(self, value: Any, modules: Collection[int]) -> bool:
        """Whether it holds, under whatever name, this container or one that the value leads to."""
        return bool(self._containers) and any(id(inner) in self._containers for inner in reachable([value], modules))


def _texts(constant: Any) -> set[str]:
    if isinstance(constant, (tuple, frozenset)):
        return {text for inner in constant for text in _texts(inner)}
    return {constant} if isinstance(constant, str) else set()


def given_to(frame: types.FrameType) -> BackwardCode | None:
    """The model's own code that a function of torch's, whose call begins, is given to run in the backward; None: no such."""
    names = _GIVEN.get(id(frame.f_code))
    if names is None:
        return None
    found = BackwardCode({LeftOut.SAVED_TENSORS} if id(frame.f_code) == _SAVED_TENSORS else set())
    for name in names:
        value = frame.f_locals.get(name)
        for function in (find_in_class(value, method) for method in _OF_FUNCTIONS) if isinstance(value, type) else (value,):
            found.add(function)
    return found if found.functions else None


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object, and those of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)
