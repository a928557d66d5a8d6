"""Python state restored: containers, attributes, variables and generators are copied when first seen and restored in place."""

from __future__ import annotations

import contextlib
import functools
import os
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from planner._compat.dispatch import untraced
from planner._compat.switches import switches_preserved
from planner.tracer.faults import calls_users_code
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.foreign import is_foreign_class, is_foreign_namespace, is_special
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import GuardedIterator, guard_in_place
from planner.tracer.host.restorers import content_of, memory_of, restore_tensors, restorer
from planner.tracer.host.values import (
    ABSENT,
    MODULE_STATE,
    attributes,
    class_homes,
    is_code,
    is_object,
    items_of,
    members,
    namespaces,
    own_class,
)


class Preserved:
    """Python state as it was when it was first seen; `restore` restores it in place.

    Args:
        guards_iterators: replace every iterator by a `GuardedIterator` until `restore`.
    """

    def __init__(self, *, guards_iterators: bool = True) -> None:
        self._guards_iterators = guards_iterators
        self._kept: dict[int, tuple[Any, Callable[[], bool], str]] = {}
        self._variables: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._at_end: list[Callable[[], None]] = []

    def finally_do(self, act: Callable[[], None]) -> None:
        """Call this after every restore."""
        self._at_end.append(act)

    def keep(self, value: Any, where: str = "") -> bool:
        """Remember what this container or object holds; False where it holds nothing that can change, or is known."""
        if id(value) in self._kept:
            return False
        restore = restorer(value, where if self._guards_iterators else None)
        if restore is None:
            return False
        self._kept[id(value)] = (value, restore, where)
        return True

    def keep_variable(self, scope: dict[str, Any], name: str) -> None:
        """Remember a global variable."""
        value = scope.get(name, ABSENT)
        self._variables.setdefault((id(scope), name), (scope, name, value))
        if self._guards_iterators:
            guard_in_place(value, f"the global variable {name}", functools.partial(scope.__setitem__, name))

    @property
    def held(self) -> tuple[Any, ...]:
        """What is remembered."""
        return tuple(value for value, _, _ in self._kept.values())

    def restore(self) -> bool:
        """Restore everything; whether anything had changed."""
        changed = False
        for scope, name, value in self._variables.values():
            if scope.get(name, ABSENT) is not value:
                _put_variable(scope, name, value)
                changed = True
        # every one, the last first: of two functions that share a variable, the second found the guard of the first there
        restored = [restore() for _, restore, _ in reversed(self._kept.values())]
        for act in self._at_end:
            act()
        return any(restored) or changed

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """At exit, restore everything kept so far to its value at entry. What is first kept inside stays in this Preserved."""
        now = self._as_it_is_now()
        try:
            yield
        finally:
            now.restore()

    def changed_by(self, run: Callable[[], Any]) -> bool:
        """Whether a call changes anything that is kept, or first kept in it. It is restored; after an error, what was kept."""
        now = self._as_it_is_now()
        try:
            run()
        finally:
            changed = now.restore()
        for scope, name, value in list(self._variables.values()):
            if (id(scope), name) not in now._variables and scope.get(name, ABSENT) is not value:
                _put_variable(scope, name, value)
                changed = True
        for value, restore, where in [kept for key, kept in self._kept.items() if key not in now._kept]:
            changed |= restore()
            del self._kept[id(value)]  # kept again, for the iterators that it holds
            self.keep(value, where)
        return changed

    def _as_it_is_now(self) -> Preserved:
        now = Preserved(guards_iterators=self._guards_iterators)
        for value, _, where in list(self._kept.values()):
            now.keep(value, where)
        for scope, name, _ in self._variables.values():
            now.keep_variable(scope, name)
        return now


def _put_variable(scope: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        scope.pop(name, None)
    else:
        scope[name] = value


@contextlib.contextmanager
def contents_preserved(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """At exit, restore the contents of tensors."""
    with untraced():
        contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        restore_tensors(contents)


@contextlib.contextmanager
def _environment_preserved() -> Iterator[None]:
    """At exit, restore the environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dict(os.environ) != before:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _memory_preserved(model: nn.Module) -> Iterator[None]:
    """At exit, tensors of the model to which code gave other memory (`tensor.data = other`) have their own again."""
    with untraced():
        tensors = (*model.parameters(), *model.buffers(), *plain_tensors(model))
        own = [(tensor, tensor.detach()) for tensor in tensors if tensor.layout is torch.strided]
    try:
        yield
    finally:
        with untraced(), torch.no_grad():
            for tensor, data in own:
                if memory_of(tensor) != memory_of(data):
                    tensor.data = data


@calls_users_code
def plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Tensors among the attributes of a model's modules, and in the containers that these hold."""
    held = [value for module in model.modules() for name, value in vars(module).items() if name not in MODULE_STATE]
    found, seen = [], set[int]()
    while held:
        value = held.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            held += [item for _, item in members(value, lambda _, __: True)]
    return found


def keep_module(preserved: Preserved, module: nn.Module, where: str = "") -> None:
    """Remember a module's attributes, and the dictionaries of its weights, submodules and hooks; not what these hold."""
    preserved.keep(module, where)
    for held in list(vars(module).values()):
        if isinstance(held, (dict, set)):
            preserved.keep(held)


def keep_model(model: nn.Module, preserved: Preserved, objects: Sequence[Any] = ()) -> Preserved:
    """Remember a model's attributes, and the containers and objects that they, or `objects`, lead to."""
    names = {id(module): "" for module in model.modules()}
    kinds = {base for module in model.modules() for base in class_homes(type(module)) if not is_foreign_class(base)}
    return keep_reachable(preserved, [*kinds, *objects, *model.modules()], names)


def keep_reachable(preserved: Preserved, start: Sequence[Any], names: Mapping[int, str]) -> Preserved:
    """Remember the attributes of objects and classes, and the containers and objects that these lead to.

    `names`: modules of the model, by identity, which are remembered only where `start` holds them.
    """
    todo = list(start)
    followed: set[int] = set()
    while todo and len(followed) < _MOST_OBJECTS:
        item = todo.pop()
        if id(item) not in followed:
            followed.add(id(item))
            preserved.keep(item, type(item).__name__)
            held = (
                [value for value in vars(item).values() if not is_code(value)]
                if isinstance(item, type)
                else attributes(item).values()
            )
            for value in list(held):
                todo += keep_deep(preserved, value, names)
    return preserved


_MOST_OBJECTS = 20_000
"""Objects followed from a model at most: some lead to everything there is."""


@calls_users_code
def keep_deep(preserved: Preserved, value: Any, names: Mapping[int, str], where: str = "") -> list[Any]:
    """Remember a value and the containers and functions it is made of; returns the objects met, whose attributes are not.

    `names`: modules of the model, by identity, which are remembered separately.
    """
    objects, todo, seen = [], [(value, where)], set[int]()
    while todo:
        item, place = todo.pop()
        known = id(item) in names and isinstance(item, (nn.Module, torch.Tensor))
        if id(item) in seen or known or isinstance(item, GuardedIterator):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module) or is_object(item):
            objects.append(item)
            todo += [(kind, kind.__name__) for kind in class_homes(type(item)) if not is_foreign_class(kind)]
            if own_class(item) is None:  # else it has items, too
                continue
        is_new = preserved.keep(item, place)
        if own_class(item) is not None and not isinstance(item, (torch.Size, bytearray)):
            todo += [(inner, f"{place}[{key!r}]") for key, inner in items_of(item)]
        elif isinstance(item, types.FunctionType):
            todo += [(content_of(cell), place) for cell in item.__closure__ or ()]
            todo += [(held, place) for held in (item.__defaults__, item.__kwdefaults__) if held]
            todo.append((vars(item), place))  # also while it is empty: to be empty again
        elif isinstance(item, types.MethodType):
            todo += [(item.__self__, place), (item.__func__, place)]
        elif isinstance(item, (types.BuiltinMethodType, types.MethodWrapperType)):
            todo += [] if isinstance(item.__self__, (types.ModuleType, type)) else [(item.__self__, place)]
        elif isinstance(item, functools.partial):
            todo += [(held, place) for held in (item.func, item.args, item.keywords, vars(item))]
        elif isinstance(item, weakref.ref):
            todo.append((item(), place))
        elif isinstance(item, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            todo.append((item.__wrapped__, place))
        elif isinstance(item, property):
            todo.append((item.fget, place))
        elif isinstance(item, ContextVar):
            todo.append((item.get(ABSENT), place))
        elif isinstance(item, types.ModuleType):
            todo += [] if is_foreign_namespace(item) else [(held, f"{place}.{name}") for name, held in containers_of(item)]
        elif isinstance(item, type) and not is_foreign_class(item):
            todo += [(held, f"{place}.{name}") for name, held in containers_of(item)]
            todo += [(held, f"{place}.{name}") for name, held in list(vars(item).items()) if is_new and _may_change(held)]
            todo += [(base, place) for base in namespaces(item)[1:]]
    return objects


def containers_of(namespace: type | types.ModuleType) -> list[tuple[str, Any]]:
    """The containers among what a class or a Python module itself holds, by name."""
    held = list(vars(namespace).items())
    return [(name, value) for name, value in held if isinstance(value, (dict, list, set, deque)) and not is_special(name)]


def _may_change(value: Any) -> bool:
    """Of what a class holds: a random generator, or a method with variables of its own, which `obj[0]` may call."""
    if is_generator(value):
        return True
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return isinstance(function, types.FunctionType) and bool(function.__closure__ or function.__defaults__)


@contextlib.contextmanager
def model_preserved(model: nn.Module, tensors: Sequence[torch.Tensor] = ()) -> Iterator[Preserved]:
    """At exit, restore what running a model may change: attributes, containers, objects, generators, switches, variables.

    Tensors of the model get back the memory and form that they had. What is yielded says with `restore()` whether something
    of it was changed so far.
    """
    preserved = keep_model(model, Preserved())
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with (
        Generators(device).preserved(),
        switches_preserved(),
        _environment_preserved(),
        contents_preserved(tensors),
        _memory_preserved(model),
    ):
        try:
            yield preserved
        finally:
            preserved.restore()
