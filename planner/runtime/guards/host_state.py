"""HostStateGuard: whether Python's state (attributes, globals, closures, environment variables) is what the plan was made for.

It runs at every call and has to take microseconds where nothing changed. So containers are compared item by item by identity;
fingerprints, which compare by value, are made again only where that fails.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import HOOK_ATTRIBUTES, MODULE_STATE
from planner.runtime.guards.mismatch import Mismatch
from planner.tracer.host.fingerprint import Difference, Fingerprint, Fingerprints, alike, first_difference
from planner.tracer.host.path import Path
from planner.tracer.host.state import HostKey, skipped_places
from planner.tracer.host.values import (
    ABSENT,
    attributes,
    class_members,
    find_in_class,
    is_array,
    is_object,
    items_of,
    members,
    namespaces,
    own_class,
    own_dict,
)

Reader = Callable[[], Sequence[Any]]
"""Returns items that are compared by identity."""


@dataclass(slots=True)
class _Group:
    """Places that are compared together: those of one submodule, or of one Python module.

    Attributes:
        expected: (place, fingerprint).
        dicts: (dictionary, its values) at and below these places, as of the last time they were found as planned.
        others: likewise (what reads a sequence of items, the items).
        sizes: likewise (variables of a class or Python module that has nothing of what is read, how many there are).
        is_known: these are filled in.
    """

    expected: list[tuple[Path, Fingerprint]]
    dicts: list[tuple[Mapping[Any, Any], list[Any]]] = field(default_factory=list)
    others: list[tuple[Reader, Sequence[Any]]] = field(default_factory=list)
    sizes: list[tuple[Sized, int]] = field(default_factory=list)
    is_known: bool = False

    @property
    def is_unchanged(self) -> bool:
        """Every container holds the same objects as when the places were last found as planned."""
        return (
            self.is_known
            and all(len(held) == size for held, size in self.sizes)
            and all(len(held) == len(values) and all(map(is_, held.values(), values)) for held, values in self.dicts)
            and all(_same(read(), items) for read, items in self.others)
        )


class HostStateGuard:
    """Compares the Python state that one model's forward reads with the captured state.

    Args:
        model: the model, or a copy of the one that was planned.
        key: which places the forward reads, with their fingerprints.
        names: returns the model's modules and weights by identity.
    """

    def __init__(self, model: nn.Module, key: HostKey, names: Callable[[], Mapping[int, str]]) -> None:
        self._model, self._key, self._names = model, key, names
        groups: dict[Any, _Group] = {}
        self._forward: _Group | None = None
        for path, expected in key.expected:
            if (path.module, path.name, path.scope) == ("", "forward", None):
                self._forward = _Group([(path, expected)])
                continue
            where = path.module if path.scope is None else id(path.scope.variables)
            groups.setdefault(where, _Group([])).expected.append((path, expected))
        self._groups = list(groups.values())
        self._functions: set[int] = set()
        self._has_new_functions = False
        named = names()
        prints = self._prints(named)
        for group in self._groups:
            now = [path.fingerprint(model, prints) for path, _ in group.expected]
            rows = zip(group.expected, now, strict=True)
            group.expected = [(path, found if alike(print_, found, copied=True) else print_) for (path, print_), found in rows]
            if all(alike(print_, found) for (_, print_), found in zip(group.expected, now, strict=True)):
                self._remember(group, named)
        self._code: list[tuple[Reader, Sequence[Any]]] = []
        self._remember_code(named)
        self._has_forgotten = False
        self._sort_groups()

    def forget(self) -> None:
        """Hold nothing that Python state held when it was last as planned; the next comparison looks at everything."""
        if not self._has_forgotten:
            self._has_forgotten = True
            for group in self._groups:
                group.dicts, group.others, group.sizes, group.is_known = [], [], [], False
            self._sort_groups()

    def _sort_groups(self) -> None:
        self._steady = [group for group in self._groups if group.is_known]
        self._changing = [group for group in self._groups if not group.is_known]
        self._remember_steady()

    def mismatch(self, *, through_forward: bool = False) -> Mismatch | None:
        """The first place that is not as planned.

        Args:
            through_forward: the plan is installed in `model.forward`, wrapped or not, so that this attribute is not compared.
        """
        if self._forward is not None and not through_forward and not self._forward.is_unchanged:
            path, expected = self._forward.expected[0]
            named = self._names()
            now = path.fingerprint(self._model, self._prints(named))
            if not alike(expected, now, copied=True):
                return _mismatch(first_difference(expected, now, "forward"))
            self._remember(self._forward, named)
            self._forward.others += [
                (lambda: [path.root(self._model)], [path.root(self._model)]),
                *self._readers_of(value for value, _ in self._values_at(path.root(self._model), set(), named)),
            ]
        for name, value in self._key.environment:
            if os.environ.get(name) != value:
                now = os.environ.get(name)
                return Mismatch("host", f"the environment variable {name}", _short(now), _short(value))
        for path, kind in self._key.containers:
            held = path.get(self._model)
            if type(held) is not kind:
                now = "absent" if held is ABSENT else f"a {type(held).__name__}"
                return Mismatch("host", str(path), now, f"a {kind.__name__}", is_absent=held is ABSENT)
        if not all(_same(read(), items) for read, items in self._code):
            found = self._compare_values(self._groups)
            if found is not None:
                return found
            self._remember_code(self._names())
        if not self._is_steady():
            changed = [group for group in self._steady if not group.is_unchanged]
            found = self._compare_values(changed)
            if found is not None:
                return found
            self._changing += changed  # these may change often: from now on each is compared on its own
            self._steady = [group for group in self._steady if not any(group is other for other in changed)]
            self._remember_steady()
        found = self._compare_values([group for group in self._changing if not group.is_unchanged])
        if found is None and self._has_new_functions:
            self._remember_code(self._names())
        if found is None and self._has_forgotten:
            self._has_forgotten = False
            self._sort_groups()
        return found

    def _is_steady(self) -> bool:
        """Whether every container of the steady groups holds the same objects; two passes over all of them at once."""
        if list(map(len, self._sized)) != self._lengths:
            return False
        values = chain.from_iterable([held.values() for held in self._dicts])
        return all(map(is_, values, self._values)) and all(_same(read(), items) for read, items in self._others)

    def _remember_steady(self) -> None:
        self._dicts = [held for group in self._steady for held, _ in group.dicts]
        sizes = [size for group in self._steady for size in group.sizes]
        self._sized = [*self._dicts, *(held for held, _ in sizes)]
        self._lengths = [len(values) for group in self._steady for _, values in group.dicts] + [size for _, size in sizes]
        self._values = [value for group in self._steady for _, values in group.dicts for value in values]
        self._others = [other for group in self._steady for other in group.others]

    def _compare_values(self, groups: Sequence[_Group]) -> Mismatch | None:
        if not groups:
            return None
        named = self._names()
        prints = self._prints(named)
        for group in groups:
            for mismatch in self._mismatches(group, prints):
                return mismatch
            self._remember(group, named)
        return None

    def changes(self) -> Iterator[Mismatch]:
        """Every place that is not as planned. Unlike `mismatch`, it remembers nothing."""
        is_code_same = all(_same(read(), items) for read, items in self._code)
        groups = [group for group in self._groups if not (is_code_same and group.is_unchanged)]
        prints = self._prints(self._names()) if groups else None
        for group in groups:
            assert prints is not None
            yield from self._mismatches(group, prints)

    def _mismatches(self, group: _Group, prints: Fingerprints) -> Iterator[Mismatch]:
        for path, expected in group.expected:
            now = path.fingerprint(self._model, prints)
            if not alike(expected, now):
                found = first_difference(expected, now, str(path))
                if path.name == "training" and path.scope is None:
                    yield Mismatch("mode", f"training mode of {path.module or 'the model'}", found.now, found.planned)
                elif path.name in HOOK_ATTRIBUTES and path.scope is None:
                    yield replace(_mismatch(found), where=f"hooks of {path.module or 'the model'} ({path.name})")
                else:
                    yield _mismatch(found)

    def _prints(self, named: Mapping[int, str]) -> Fingerprints:
        return Fingerprints(named, self._key.reads.wants, skipped_places(self._key.left, self._model))

    def _remember(self, group: _Group, named: Mapping[int, str]) -> None:
        """Note what each container of these places holds now."""
        group.dicts, group.others, group.sizes, group.is_known = [], [], [], True
        skipped = {id(path.get(self._model)) for path in self._key.left}
        modules = {path.module: None for path, _ in group.expected if path.scope is None}
        for name in modules:
            _note_module(group, self._model.get_submodule(name), [path.name for path, _ in group.expected])
        for path, _ in group.expected:
            for value, has_members in self._values_at(path.root(self._model), skipped, named):
                if not isinstance(value, FunctionType):
                    _note_value(group, value, has_members)
                elif id(value) not in self._functions:
                    self._has_new_functions = True
        scoped = [(path.scope.variables, path.name) for path, _ in group.expected if path.scope is not None]
        if scoped:
            read = lambda: [variables.get(name, ABSENT) for variables, name in scoped]
            group.others.append((read, read()))

    def _values_at(self, root: Any, seen: set[int], named: Mapping[int, str]) -> Iterator[tuple[Any, bool]]:
        """Each container and object at and below a place, and whether it has parts; each once."""
        todo = [root]
        while todo:
            value = todo.pop()
            known = id(value) in named and isinstance(value, (nn.Module, torch.Tensor))
            if known or id(value) in seen or isinstance(value, torch.Tensor):
                continue
            wants = self._key.reads.wants
            inner = [item for _, item in chain(members(value, wants), class_members(value, wants))]
            seen.add(id(value))
            todo += inner
            yield value, bool(inner)

    def _readers_of(self, values: Iterable[Any]) -> list[tuple[Reader, Sequence[Any]]]:
        """Readers of the functions among these values, and what they read now."""
        functions = [value for value in values if isinstance(value, FunctionType)]
        self._functions.update(map(id, functions))  # which the readers keep alive
        readers: list[Reader] = [partial(_of_function, value) for value in functions]
        return [(read, list(read())) for read in readers]

    def _remember_code(self, named: Mapping[int, str]) -> None:
        """Note functions and class attributes once for all places: many places share them."""
        self._code, self._functions, self._has_new_functions = [], set(), False
        seen, known = set[int](), set[tuple[type, str]]()
        for path, _ in (row for group in self._groups for row in group.expected):
            values = [value for value, _ in self._values_at(path.root(self._model), seen, named)]
            self._code += self._readers_of(values)
            known |= {(type(value), name) for value in values for (_, name), _ in class_members(value, self._key.reads.wants)}
            if path.scope is None:
                module = self._model.get_submodule(path.module)
                if (type(module), path.name) not in known and path.name not in vars(module):
                    known.add((type(module), path.name))
        pairs = [(kind, name) for kind, name in known if find_in_class(kind, name) is not ABSENT]
        read: Reader = lambda: [find_in_class(kind, name) for kind, name in pairs]
        self._code.append((read, list(read())))


def _short(value: str | None) -> str:
    return "unset" if value is None else repr(value)[:80]


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
        read: Reader = lambda: [holder.get(name, ABSENT) for holder, name in empty]
        group.others.append((read, list(read())))


def _may_appear(module: nn.Module, name: str) -> bool:
    """Whether a parameter, buffer or submodule registered under this name later would be what the forward reads."""
    return name not in vars(module) and find_in_class(type(module), name) is ABSENT


def _note_value(group: _Group, value: Any, has_members: bool) -> None:
    if isinstance(value, (dict, MappingProxyType)):
        kind: Any = own_class(value) or MappingProxyType
        read: Reader = lambda: list(kind.__iter__(value))
        group.others.append((read, read()))
        if type(value) in (dict, MappingProxyType):
            group.dicts.append((value, list(value.values())))
        else:  # a derived class may override `len` and `values`
            inside: Reader = lambda: list(kind.values(value))
            group.others.append((inside, inside()))
    elif isinstance(value, Enum):  # a member may be a number or a text, too
        group.dicts.append((vars(value), list(vars(value).values())))
    elif isinstance(value, (str, bytes, int, float, complex)) or value is None:
        if is_object(value):  # of a class derived from Python's
            _note_attributes(group, value)
    elif isinstance(value, (type, ModuleType)):
        held = [vars(home) for home in namespaces(value)]
        if has_members:
            group.dicts += [(variables, list(variables.values())) for variables in held]
        else:  # something may come that the forward asks for
            group.sizes += [(variables, len(variables)) for variables in held]
    elif isinstance(value, ContextVar):
        read = lambda: [value.get(None)]
        group.others.append((read, read()))
    elif is_array(value) or isinstance(value, (bytearray, set)):
        content = _content(value)
        # one item: the same object while the content is equal
        read = lambda: [content if _content(value) == content else None]
        group.others.append((read, [content]))
    elif isinstance(value, (list, deque)):
        read = (lambda: value) if type(value) is list else (lambda: [item for _, item in items_of(value)])
        group.others.append((read, list(read())))
    if isinstance(value, _CONTAINERS):
        if is_object(value):  # its class derives from Python's
            _note_attributes(group, value)
    elif (has_members or is_object(value)) and not isinstance(value, (type, ModuleType, ContextVar)):
        _note_attributes(group, value)


_CONTAINERS = (dict, list, deque, tuple, set, bytearray)


def _note_attributes(group: _Group, value: Any) -> None:
    """Note an object's attributes, those in slots included."""
    own = own_dict(value)
    held = own or {}
    if own is not None:  # an empty one, too: it may hide attributes of the class later
        group.dicts.append((own, list(own.values())))
        read_form: Reader = lambda: [type(value), getattr(value, "__dict__", None)]  # both can be assigned
        group.others.append((read_form, [type(value), own]))
    if isinstance(value, nn.Module):  # not registered in the model
        group.dicts += [(held[kind], list(held[kind].values())) for kind in MODULE_STATE]
    if attributes(value).keys() - held.keys():
        read: Reader = lambda: [item for name, item in attributes(value).items() if name not in held]
        group.others.append((read, read()))


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
