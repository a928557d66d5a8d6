"""Whether Python's state is what a plan was made for. Looked at at every call, so that the usual answer takes microseconds:
containers are compared item by item by identity, and only where that fails are fingerprints made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import nn

from planner.runtime.mismatch import Mismatch
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, alike, first_difference
from planner.tracer.host.state import HostKey, Path, look_up
from planner.tracer.host.values import MODULE_STATE, attributes, parts

Look = Callable[[], Sequence[Any]]


@dataclass(slots=True)
class _Group:
    """Places that are looked at together: those of one submodule, or of one Python module.

    Attributes:
        expected: (place, fingerprint).
        dicts: (dictionary, its values) at and below these places.
        others: (what reads a sequence of items, the items).
    """

    expected: list[tuple[Path, Fingerprint]]
    dicts: list[tuple[Mapping[Any, Any], list[Any]]] = field(default_factory=list)
    others: list[tuple[Look, list[Any]]] = field(default_factory=list)
    is_known: bool = False

    @property
    def is_unchanged(self) -> bool:
        """Every container holds the objects that it held when the places were last found to be as planned."""
        return self.is_known and all(len(held) == len(values) and all(map(is_, held.values(), values)) for held, values in self.dicts) and all(
            len(now := look()) == len(items) and all(map(is_, now, items)) for look, items in self.others
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
        for path, expected in key.expected:
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

    def difference(self) -> Mismatch | None:
        """The first place that is not as it was planned for."""
        for name, value in self._key.environment:
            if os.environ.get(name) != value:
                return Mismatch("host", f"the environment variable {name}", repr(os.environ.get(name)), repr(value))
        for group in self._groups:
            if not group.is_unchanged:
                found = self._look_closer(group)
                if found is not None:
                    return found
        return None

    def _look_closer(self, group: _Group) -> Mismatch | None:
        prints = self._prints()
        for path, expected in group.expected:
            now = prints.of(path.root(self._model))
            if not alike(expected, now):
                where, old, new = first_difference(expected, now, str(path))
                if path.name == "training" and path.scope is None:
                    return Mismatch("mode", f"training mode of {path.module or 'the model'}", new, old)
                return Mismatch("host", where, new, old)
        self._remember(group)
        return None

    def _prints(self) -> Fingerprints:
        growing = {id(path.get(self._model)) for path in self._key.growing}
        return Fingerprints(self._names(), self._key.reads.wants, growing)

    def _remember(self, group: _Group) -> None:
        """Note what every container of these places holds now."""
        group.dicts, group.others, group.is_known = [], [], True
        seen: set[int] = set()
        growing = {id(path.get(self._model)) for path in self._key.growing}
        named = self._names()
        modules: set[str] = set()
        for path, _ in group.expected:
            if path.scope is None and path.module not in modules:
                modules.add(path.module)
                self._note_module(group, self._model.get_submodule(path.module), [p.name for p, _ in group.expected])
            todo = [path.root(self._model)]
            while todo:
                value = todo.pop()
                known = id(value) in named and isinstance(value, (nn.Module, torch.Tensor))
                if known or id(value) in seen or id(value) in growing or isinstance(value, torch.Tensor):
                    continue
                inner = [item for _, item in parts(value, self._key.reads.wants)]
                seen.add(id(value))
                todo += inner
                _note_value(group, value, bool(inner))
        scoped = [(path.scope.variables, path.name) for path, _ in group.expected if path.scope is not None]
        if scoped:
            look = lambda: [variables.get(name, _MISSING) for variables, name in scoped]
            group.others.append((look, look()))

    @staticmethod
    def _note_module(group: _Group, module: nn.Module, names: Sequence[str]) -> None:
        group.dicts.append((vars(module), list(vars(module).values())))
        absent = [
            (vars(module)[kind], name)
            for name in names
            for kind in MODULE_STATE
            if vars(module)[kind].get(name, _MISSING) is None
        ]
        if absent:
            look: Look = lambda: [held.get(name, _MISSING) for held, name in absent]
            group.others.append((look, look()))
        inherited = [
            name for name in names if name not in vars(module) and not any(name in vars(module)[k] for k in MODULE_STATE)
        ]
        if inherited:
            look = lambda: [look_up(module, name) for name in inherited]
            group.others.append((look, look()))


_MISSING = object()


def _note_value(group: _Group, value: Any, has_parts: bool) -> None:
    if isinstance(value, dict):
        group.dicts.append((value, list(value.values())))
        look: Look = lambda: list(value)
        group.others.append((look, look()))
    elif isinstance(value, (str, bytes, tuple, type, int, float)) or value is None:
        return
    elif isinstance(value, FunctionType):
        look = lambda: _of_function(value)
        group.others.append((look, look()))
    elif hasattr(value, "tobytes") or isinstance(value, (bytearray, set)):
        content = _content(value)
        # one item, the same object as long as the content is equal
        look = lambda: [content if _content(value) == content else None]
        group.others.append((look, [content]))
    elif isinstance(value, (list,)) or hasattr(value, "appendleft"):
        group.others.append((lambda: value, list(value)))
    elif has_parts:
        if hasattr(value, "__dict__"):
            group.dicts.append((vars(value), list(vars(value).values())))
        else:
            look = lambda: list(attributes(value).values())
            group.others.append((look, look()))


def _of_function(value: FunctionType) -> list[Any]:
    cells = []
    for cell in value.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            cells.append(_MISSING)
    return [value.__code__, value.__defaults__, value.__kwdefaults__, *cells, *vars(value).values()]


def _content(value: Any) -> Any:
    return frozenset(value) if isinstance(value, set) else bytes(value) if isinstance(value, bytearray) else value.tobytes()
