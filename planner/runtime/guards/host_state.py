"""Whether Python's state is what a plan was made for. Looked at at every call, so that the usual answer takes microseconds:
containers are compared item by item by identity, and only where that fails are fingerprints made again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from planner.runtime.guards.mismatch import Mismatch
from planner.tracer.host.fingerprint import Difference, Fingerprint, Fingerprints, alike, first_difference
from planner.tracer.host.state import HostKey, Path, find_in_class, skipped_places
from planner.tracer.host.values import (
    ABSENT,
    MODULE_STATE,
    attributes,
    is_array,
    is_object,
    items_of,
    own_class,
    own_dict,
    parts,
)

Look = Callable[[], Sequence[Any]]
"""Reads items that are compared by identity."""


@dataclass(slots=True)
class _Group:
    """Places that are looked at together: those of one submodule, or of one Python module.

    Attributes:
        expected: (place, fingerprint).
        dicts: (dictionary, its values) at and below these places.
        others: (what reads a sequence of items, the items).
        is_known: `dicts` and `others` are what the places held when they were last found to be as planned.
    """

    expected: list[tuple[Path, Fingerprint]]
    dicts: list[tuple[Mapping[Any, Any], list[Any]]] = field(default_factory=list)
    others: list[tuple[Look, Sequence[Any]]] = field(default_factory=list)
    is_known: bool = False

    @property
    def is_unchanged(self) -> bool:
        """Every container holds the objects that it held when the places were last found to be as planned."""
        return (
            self.is_known
            and all(len(held) == len(values) and all(map(is_, held.values(), values)) for held, values in self.dicts)
            and all(_same(look(), items) for look, items in self.others)
        )


class HostGuard:
    """Python state of one model as its plan needs it.

    Args:
        model: the model, or a copy of the one that was planned.
        key: from the joint graph.
        names: the model's modules and weights by identity.
    """

    def __init__(self, model: nn.Module, key: HostKey, names: Callable[[], Mapping[int, str]]) -> None:
        self._model, self._key, self._names = model, key, names
        groups: dict[Any, _Group] = {}
        self._forward: tuple[Path, Fingerprint] | None = None
        for path, expected in key.expected:
            if (path.module, path.name, path.scope) == ("", "forward", None):
                self._forward = (path, expected)
                continue
            where = path.module if path.scope is None else id(path.scope.variables)
            groups.setdefault(where, _Group([])).expected.append((path, expected))
        self._groups = list(groups.values())
        prints = self._prints()
        for group in self._groups:
            now = [prints.of(path.root(model)) for path, _ in group.expected]
            rows = zip(group.expected, now, strict=True)
            group.expected = [(path, found if alike(print_, found, copied=True) else print_) for (path, print_), found in rows]
            if all(alike(print_, found) for (_, print_), found in zip(group.expected, now, strict=True)):
                self._remember(group)
        self._code: list[tuple[Look, Sequence[Any]]] = []
        self._remember_code()
        self._steady = [group for group in self._groups if group.is_known]
        self._moving = [group for group in self._groups if not group.is_known]
        self._remember_steady()

    def difference(self, *, through_forward: bool = False) -> Mismatch | None:
        """The first place that is not as it was planned for.

        `through_forward`: the plan stands in the model's `forward`, which called it, wrapped or not.
        """
        if self._forward is not None and not through_forward:
            path, expected = self._forward
            now = self._prints().of(path.root(self._model))
            if not alike(expected, now, copied=True):
                return _mismatch(first_difference(expected, now, "forward"))
        for name, value in self._key.environment:
            if os.environ.get(name) != value:
                return Mismatch("host", f"the environment variable {name}", repr(os.environ.get(name)), repr(value))
        if not all(_same(look(), items) for look, items in self._code):
            found = self._look_closer(self._groups)
            if found is not None:
                return found
            self._remember_code()
        if not self._is_steady():
            changed = [group for group in self._steady if not group.is_unchanged]
            found = self._look_closer(changed)
            if found is not None:
                return found
            self._moving += changed  # these change as a rule, and are looked at one by one from now on
            self._steady = [group for group in self._steady if not any(group is other for other in changed)]
            self._remember_steady()
        return self._look_closer([group for group in self._moving if not group.is_unchanged])

    def _is_steady(self) -> bool:
        """No container of the steady groups holds another object than it held; in two passes over all of them."""
        if list(map(len, self._dicts)) != self._lengths:
            return False
        values = chain.from_iterable([held.values() for held in self._dicts])
        return all(map(is_, values, self._values)) and all(_same(look(), items) for look, items in self._others)

    def _remember_steady(self) -> None:
        self._dicts = [held for group in self._steady for held, _ in group.dicts]
        self._lengths = [len(values) for group in self._steady for _, values in group.dicts]
        self._values = [value for group in self._steady for _, values in group.dicts for value in values]
        self._others = [other for group in self._steady for other in group.others]

    def _look_closer(self, groups: Sequence[_Group]) -> Mismatch | None:
        prints = self._prints() if groups else None
        for group in groups:
            for path, expected in group.expected:
                assert prints is not None
                now = prints.of(path.root(self._model))
                if not alike(expected, now):
                    found = first_difference(expected, now, str(path))
                    if path.name == "training" and path.scope is None:
                        return Mismatch("mode", f"training mode of {path.module or 'the model'}", found.now, found.planned)
                    return _mismatch(found)
            self._remember(group)
        return None

    def _prints(self) -> Fingerprints:
        return Fingerprints(self._names(), self._key.reads.wants, skipped_places(self._key.left, self._model))

    def _remember(self, group: _Group) -> None:
        """Note what every container of these places holds now."""
        group.dicts, group.others, group.is_known = [], [], True
        skipped = {id(path.get(self._model)) for path in self._key.left}
        named = self._names()
        modules = {path.module: None for path, _ in group.expected if path.scope is None}
        for name in modules:
            _note_module(group, self._model.get_submodule(name), [path.name for path, _ in group.expected])
        for path, _ in group.expected:
            for value, has_parts in self._values_at(path.root(self._model), skipped, named):
                if not isinstance(value, FunctionType):
                    _note_value(group, value, has_parts)
        scoped = [(path.scope.variables, path.name) for path, _ in group.expected if path.scope is not None]
        if scoped:
            look = lambda: [variables.get(name, ABSENT) for variables, name in scoped]
            group.others.append((look, look()))

    def _values_at(self, root: Any, seen: set[int], named: Mapping[int, str]) -> Iterator[tuple[Any, bool]]:
        """Every container and object at and below a place, and whether it has parts; each once."""
        todo = [root]
        while todo:
            value = todo.pop()
            known = id(value) in named and isinstance(value, (nn.Module, torch.Tensor))
            if known or id(value) in seen or isinstance(value, torch.Tensor):
                continue
            inner = [item for _, item in parts(value, self._key.reads.wants)]
            seen.add(id(value))
            todo += inner
            yield value, bool(inner)

    def _remember_code(self) -> None:
        """Note functions and what classes hold, which many places share, once for all of them."""
        self._code = []
        named, seen, known = self._names(), set[int](), set[tuple[type, str]]()
        for path, _ in (row for group in self._groups for row in group.expected):
            for value, _has_parts in self._values_at(path.root(self._model), seen, named):
                if isinstance(value, FunctionType):
                    look: Look = partial(_of_function, value)
                    self._code.append((look, list(look())))
            if path.scope is None:
                module = self._model.get_submodule(path.module)
                if (type(module), path.name) not in known and path.name not in vars(module):
                    known.add((type(module), path.name))
        pairs = [(kind, name) for kind, name in known if find_in_class(kind, name) is not ABSENT]
        look = lambda: [find_in_class(kind, name) for kind, name in pairs]
        self._code.append((look, list(look())))


def _mismatch(found: Difference) -> Mismatch:
    return Mismatch("host", found.where, found.now, found.planned, found.is_absent)


def _same(items: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(items) == len(others) and all(map(is_, items, others))


def _note_module(group: _Group, module: nn.Module, names: Sequence[str]) -> None:
    group.dicts.append((vars(module), list(vars(module).values())))
    holders = [vars(module)[kind] for kind in MODULE_STATE]
    missing = [name for name in names if all(holder.get(name) is None for holder in holders) and _may_appear(module, name)]
    empty = [(holder, name) for name in missing for holder in holders]
    if empty:
        look: Look = lambda: [holder.get(name, ABSENT) for holder, name in empty]
        group.others.append((look, list(look())))


def _may_appear(module: nn.Module, name: str) -> bool:
    """A parameter, buffer or submodule that is given this name later would be what the forward reads under it."""
    return name not in vars(module) and find_in_class(type(module), name) is ABSENT


def _note_value(group: _Group, value: Any, has_parts: bool) -> None:
    if isinstance(value, (dict, MappingProxyType)):
        kind: Any = own_class(value) or MappingProxyType
        look: Look = lambda: list(kind.__iter__(value))
        group.others.append((look, look()))
        if type(value) in (dict, MappingProxyType):
            group.dicts.append((value, list(value.values())))
        else:  # its own `len` and `values` may say anything
            inside: Look = lambda: list(kind.values(value))
            group.others.append((inside, inside()))
    elif isinstance(value, (str, bytes, int, float, complex)) or value is None:
        return  # of a derived class, too: compared by value, attributes left out
    elif isinstance(value, (type, ModuleType)):
        if has_parts:
            group.dicts.append((vars(value), list(vars(value).values())))
    elif isinstance(value, ContextVar):
        look = lambda: [value.get(None)]
        group.others.append((look, look()))
    elif is_array(value) or isinstance(value, (bytearray, set)):
        content = _content(value)
        # one item, the same object as long as the content is equal
        look = lambda: [content if _content(value) == content else None]
        group.others.append((look, [content]))
    elif isinstance(value, (list, deque)):
        look = (lambda: value) if type(value) in (list, tuple) else (lambda: [item for _, item in items_of(value)])
        group.others.append((look, list(look())))
    if isinstance(value, _CONTAINERS):
        if is_object(value):  # of a class derived from Python's
            _note_attributes(group, value)
    elif has_parts and not isinstance(value, (type, ModuleType, ContextVar)):
        _note_attributes(group, value)


_CONTAINERS = (dict, list, deque, tuple, set, bytearray)


def _note_attributes(group: _Group, value: Any) -> None:
    """What an object's attributes are, those in slots included."""
    held = own_dict(value) or {}
    if held:
        group.dicts.append((held, list(held.values())))
    if isinstance(value, nn.Module):  # one that the model does not list among its own
        group.dicts += [(held[kind], list(held[kind].values())) for kind in MODULE_STATE]
    if attributes(value).keys() - held.keys():
        look: Look = lambda: [item for name, item in attributes(value).items() if name not in held]
        group.others.append((look, look()))


def _of_function(value: FunctionType) -> list[Any]:
    cells = []
    for cell in value.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            cells.append(ABSENT)
    return [value.__code__, value.__defaults__, value.__kwdefaults__, *cells, *vars(value).values()]


def _content(value: Any) -> Any:
    return frozenset(value) if isinstance(value, set) else bytes(value) if isinstance(value, bytearray) else value.tobytes()
