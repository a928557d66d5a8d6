"""Python values as trees: the members of a value (`written_values` says how one is written, or built again from them).

A `PathStep` leads from a value to one of its members: ("item", key), ("attr", name), ("cell", position), ... A leaf has none.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
import weakref
from array import array
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import MODULE_STATE
from planner.tracer.faults import calls_users_code
from planner.tracer.host.foreign import is_called_by_expressions, is_foreign_class, is_foreign_namespace, is_special

PathStep = tuple[str, Any]
Wanted = Callable[[Any, str], bool]
"""Whether an attribute of an object belongs to the tree."""

ABSENT = type("Absent", (), {"__repr__": lambda self: "absent", "__reduce__": lambda self: "ABSENT"})()
"""Stands for an attribute or variable that does not exist."""

_TORCH = str(Path(torch.__file__).parent)


@calls_users_code
def is_object(value: Any) -> bool:
    """A plain object of the user's, or of a library that is written in Python: its attributes are its members."""
    kind = type(value)
    if kind is types.SimpleNamespace:
        return True
    if isinstance(value, (type, types.ModuleType, torch.Tensor, Enum, BaseException)) or is_foreign_class(kind):
        return False
    return hasattr(value, "__dict__") or any("__slots__" in vars(base) for base in kind.__mro__[:-1])


def is_array(value: Any) -> bool:
    """A numpy array or number, or an array of the standard library: compared by its bytes.

    By class: an object whose `__getattr__` answers to every name has a `tobytes`, too.
    """
    numpy = sys.modules.get("numpy")
    return isinstance(value, array) or (numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)))


def is_code(value: Any) -> bool:
    """A function, method, property, class or Python module: compared where it runs."""
    return isinstance(value, (types.FunctionType, staticmethod, classmethod, property, type, types.ModuleType))


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def is_plain(value: Any) -> bool:
    """A number, a text, None, a type of torch's or a tuple of these: what copies of a model can share."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in _PLAIN or isinstance(value, Enum)


def is_iterator(value: Any) -> bool:
    """The value is used up as it is read: a generator, itertools.cycle, a file."""
    return hasattr(type(value), "__next__") and type(value) not in weakref.ProxyTypes  # which have all methods there are


@calls_users_code
def own_dict(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's own attributes; None where it has none.

    A `__dict__` that cannot be written belongs to another object: `list[int]` shows that of `list`, a proxy that of its target.
    """
    held = getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else None


def find_in_class(kind: type, name: str) -> Any:
    """What a class, or one that it derives from, holds under this name; ABSENT where none does."""
    return next((vars(base)[name] for base in class_homes(kind) if name in vars(base)), ABSENT)


def class_homes(kind: type) -> tuple[type, ...]:
    """Where attributes of a class are looked up: in it, in its bases and, last, in a metaclass of the user's."""
    own: type = type(kind)
    return kind.__mro__ if own is type else (*kind.__mro__, *(base for base in own.__mro__ if not is_foreign_class(base)))


@calls_users_code
def attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, those in slots included."""
    found = dict(own_dict(value) or {})
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            in_class = find_in_class(type(value), name)
            if isinstance(in_class, types.MemberDescriptorType) and hasattr(value, name):  # else a class attribute hides it
                found[name] = getattr(value, name)
    return found


_CONTAINERS = (OrderedDict, dict, set, frozenset, list, tuple, deque, bytearray)
_EXACT = frozenset(_CONTAINERS)


def own_class(value: Any) -> Any:
    """Python's own container class that a value is of, or derived from; None for others.

    What it holds is read by this class's methods: those of a derived class are the user's, and may do anything.
    """
    kind = type(value)
    if kind in _EXACT:  # most values: asked a hundred thousand times in a capture
        return kind
    return next((base for base in _CONTAINERS if isinstance(value, base)), None)


def items_of(value: Any) -> list[tuple[Any, Any]]:
    """Key and item of a dictionary, place and item of another container, in order."""
    kind = own_class(value)
    if kind in (OrderedDict, dict):
        return list(kind.items(value))
    return list(enumerate(kind.__iter__(value)))


def members(value: Any, wanted: Wanted) -> Iterator[tuple[PathStep, Any]]:
    """The members of a value, each with its step; a leaf has none."""
    if type(value) in (str, bytes) or isinstance(value, (torch.Tensor, torch.Size)):
        return
    if isinstance(value, (list, tuple, deque)):
        yield from ((("item", i), item) for i, item in items_of(value))
    elif isinstance(value, dict):
        yield from ((("item", key), item) for key, item in items_of(value))
    elif isinstance(value, types.MappingProxyType):
        yield from ((("item", key), item) for key, item in value.items())
    elif isinstance(value, types.FunctionType):
        yield from _members_of_function(value)
    elif isinstance(value, types.MethodType):
        yield ("attr", "__self__"), value.__self__
        yield ("attr", "__func__"), value.__func__
        return
    elif isinstance(value, types.BuiltinMethodType):  # `settings.get`, kept
        if not isinstance(value.__self__, (types.ModuleType, type)):
            yield ("attr", "__self__"), value.__self__
        return
    elif isinstance(value, functools.partial):
        yield from ((("attr", name), getattr(value, name)) for name in ("func", "args", "keywords"))
        return
    elif isinstance(value, (staticmethod, classmethod, functools._lru_cache_wrapper)):
        yield ("attr", "__wrapped__"), value.__wrapped__
        return
    elif isinstance(value, property):
        yield from ((("attr", name), getattr(value, name)) for name in ("fget", "fset") if getattr(value, name))
        return
    elif isinstance(value, ChainMap):
        yield ("attr", "maps"), value.maps
        return
    elif isinstance(value, ContextVar):
        yield ("value", None), value.get(ABSENT)
        return
    elif isinstance(value, weakref.ref):
        yield ("value", None), value()
        return
    elif isinstance(value, threading.local):
        yield from ((("attr", name), item) for name, item in vars(value).items())
        return
    elif isinstance(value, (type, types.ModuleType)):
        yield from _members_of_namespace(value, wanted)
        return
    elif isinstance(value, Enum):
        held = ((name, item) for name, item in vars(value).items() if name not in _OF_ENUM_MEMBERS)
        yield from ((("attr", name), item) for name, item in held if wanted(value, name) or not is_plain(item))
        return
    if isinstance(value, nn.Module):
        for name in MODULE_STATE:
            yield from (((name, key), item) for key, item in vars(value)[name].items())
    if is_object(value) or isinstance(value, nn.Module):
        yield from ((("attr", name), item) for name, item in attributes(value).items() if wanted(value, name))


def class_members(value: Any, wanted: Wanted) -> Iterator[tuple[PathStep, Any]]:
    """What an object has by its class, data and code, each with its step; of a library's classes nothing.

    Also what its own attributes hide: code may ask the class; and methods that expressions call without naming them.
    """
    if not is_object(value):
        return
    found: set[str] = set()
    for base in class_homes(type(value)):
        if is_foreign_class(base):
            continue
        for name, item in list(vars(base).items()):
            is_slot = isinstance(item, types.MemberDescriptorType)
            is_method = isinstance(item, types.FunctionType) and is_called_by_expressions(name)
            is_read = is_method or (not is_special(name) and wanted(value, name))
            if is_read and name not in found and not is_slot:
                found.add(name)
                yield ("class", name), item


_MOST = 20_000
"""Objects and containers that are followed at most: some lead to everything there is."""


def reachable(values: Iterable[Any], ends: Collection[int] = ()) -> Iterator[Any]:
    """These values and all that they lead to, by attributes and items; not through Python modules, nor endlessly.

    Unlike `members`, it looks into objects of libraries, too: an exception, a lock.

    Args:
        values: what to start from.
        ends: identities of values that are yielded, and not entered.
    """
    todo = list(values)
    seen: dict[int, Any] = {}  # with the values, so that no identity is used twice
    while todo and len(seen) < _MOST:
        value = todo.pop()
        if id(value) in seen or type(value) in _PLAIN or isinstance(value, types.ModuleType):
            continue
        seen[id(value)] = value
        yield value
        if id(value) in ends:
            continue
        todo += [inner for _, inner in members(value, lambda _, name: True)]
        if isinstance(value, (set, frozenset)):
            todo += [inner for _, inner in items_of(value)]
        if is_foreign_class(type(value)) and not isinstance(value, (nn.Module, torch.Tensor)) and not is_code(value):
            todo += attributes(value).values()


_NOT_ENTERED = (nn.Module, type, types.ModuleType, types.CodeType)


def hidden_in(value: Any) -> Iterator[Any]:
    """A value and all that it leads to but modules and classes, as Python's collector sees it; not endlessly.

    Unlike `members` and `reachable`, it looks into everything: iterators, views of dictionaries, bound methods. Of a function
    it follows what that holds, and not its global variables.
    """
    todo, seen = [value], dict[int, Any]()
    while todo and len(seen) < _MOST:
        one = todo.pop()
        if id(one) in seen or type(one) in _PLAIN or isinstance(one, _NOT_ENTERED):
            continue
        seen[id(one)] = one
        yield one
        if isinstance(one, types.FunctionType):
            todo += [inner for _, inner in members(one, lambda _, name: True)]
        elif not isinstance(one, torch.Tensor):
            todo += gc.get_referents(one)


def namespaces(value: type | types.ModuleType) -> list[type | types.ModuleType]:
    """Where attributes of a class or a Python module of the user's are looked up: in it, its bases and its metaclass."""
    if is_foreign_namespace(value):
        return []
    others = class_homes(value)[1:] if isinstance(value, type) else ()
    return [value, *(base for base in others if not is_foreign_namespace(base))]


def _members_of_namespace(value: type | types.ModuleType, wanted: Wanted) -> Iterator[tuple[PathStep, Any]]:
    """What a class or a Python module of the user's holds, code included: another function may take its place."""
    found: set[str] = set()
    for home in namespaces(value):
        for name, item in list(vars(home).items()):
            if not is_special(name) and name not in found and wanted(value, name):
                found.add(name)
                yield ("attr", name), item


def _members_of_function(value: types.FunctionType) -> Iterator[tuple[PathStep, Any]]:
    if value.__code__.co_filename.startswith(_TORCH):
        return
    for i, cell in enumerate(value.__closure__ or ()):
        if value.__code__.co_freevars[i] == "__class__":
            continue
        try:
            yield ("cell", i), cell.cell_contents
        except ValueError:  # an empty cell: a name that is not bound yet
            yield ("cell", i), ABSENT
    yield ("attr", "__code__"), value.__code__
    yield from ((("attr", name), getattr(value, name)) for name in ("__defaults__", "__kwdefaults__") if getattr(value, name))
    yield from ((("attr", name), item) for name, item in vars(value).items())


def member(value: Any, step: PathStep) -> Any:
    """The member of a value that a step leads to; ABSENT where there is none."""
    kind, key = step
    try:
        if kind == "item":  # by Python's own methods: those of derived classes make what is missing, or count
            return dict.get(value, key, ABSENT) if isinstance(value, dict) else value[key]
        if kind == "cell":
            return value.__closure__[key].cell_contents
        if kind == "class":
            return find_in_class(type(value), key)
        if kind == "value":
            return value.get(ABSENT) if isinstance(value, ContextVar) else value()
        if kind in MODULE_STATE:
            return vars(value)[kind].get(key, ABSENT)
        if isinstance(value, nn.Module):
            return vars(value).get(key, ABSENT)
        if isinstance(value, type):
            return find_in_class(value, key)
        if is_object(value) and key in (own_dict(value) or ()):
            return own_dict(value)[key]  # type: ignore[index]
        if is_object(value) and not isinstance(find_in_class(type(value), key), types.MemberDescriptorType):
            return ABSENT  # a property would run
        return getattr(value, key, ABSENT)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return ABSENT


_OF_ENUM_MEMBERS = ("_name_", "__objclass__", "_sort_order_")


def text_of(step: PathStep) -> str:
    """The step as Python writes it: '.name', '[0]', "['key']"."""
    kind, key = step
    if kind == "item":
        return f"[{key!r}]"
    if kind == "cell":
        return f" (closure variable {key})"
    return "" if kind == "value" else f".{key}"
