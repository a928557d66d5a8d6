"""Values written: one member replaced, in place or in a copy, and a whole value built again with other leaves."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from planner.kernels.calls import like
from planner.tracer.host.values import MODULE_STATE, PathStep, attributes, is_object, items_of, namespaces, own_dict

_OF_FUNCTIONS = ("__code__", "__defaults__", "__kwdefaults__")
_OF_PARTIALS = ("func", "args", "keywords")


def with_member(value: Any, step: PathStep, new: Any) -> Any:
    """Write a member. Returns the value itself where it could be changed in place, else a copy with the new member.

    Raises:
        TypeError: a value of this kind cannot be written.
    """
    kind, key = step
    if kind == "item" and isinstance(value, (list, deque, dict)):
        value[key] = new
        return value
    if kind == "item" and isinstance(value, tuple):
        items = [*value[:key], new, *value[key + 1 :]]
        return like(value, items)
    if kind == "cell":
        value.__closure__[key].cell_contents = new
        return value
    if kind == "value" and isinstance(value, ContextVar):
        value.set(new)
        return value
    if kind in MODULE_STATE:
        vars(value)[kind][key] = new
        return value
    if kind == "attr" and isinstance(value, types.FunctionType) and key in _OF_FUNCTIONS:
        setattr(value, key, new)
        return value
    if kind == "attr" and isinstance(value, functools.partial) and key in _OF_PARTIALS:
        parts = {"func": value.func, "args": value.args, "keywords": value.keywords, key: new}
        value.__setstate__((*parts.values(), vars(value)))  # type: ignore[attr-defined]  # its attributes are read-only
        return value
    if kind == "attr" and key == "__self__" and isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, new)
    if kind == "attr" and key == "__self__" and isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
        return getattr(new, value.__name__)
    if kind == "attr":
        inner = own_dict(value)
        if inner is not None:
            inner[key] = new
        elif isinstance(value, type):
            setattr(next((home for home in namespaces(value) if key in vars(home)), value), key, new)
        else:
            object.__setattr__(value, key, new)
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written at {key!r}")


Built = dict[int, tuple[Any, Any]]
"""Containers and objects that were built again, by identity: the old one and the new one."""


def rebuilt(value: Any, leaf: Callable[[Any], Any], built: Built | None = None) -> Any:
    """A new value of the same build, its leaves replaced by `leaf(old)`.

    Args:
        built: what was built before, and is now: what stands in several places is built once. By default, of this value alone.

    Raises:
        TypeError: it holds something that cannot be built again.
    """
    if isinstance(value, torch.Tensor) or not is_built(value):
        return leaf(value)
    built = {} if built is None else built
    if isinstance(value, tuple):
        items = [rebuilt(item, leaf, built) for item in value]
        return like(value, items)
    if id(value) in built:
        return built[id(value)][1]
    made = copy.copy(value)
    built[id(value)] = value, made
    if isinstance(value, (list, deque)):
        for i, item in items_of(value):
            made[i] = rebuilt(item, leaf, built)
    elif isinstance(value, dict):
        for key, item in items_of(value):
            made[key] = rebuilt(item, leaf, built)
    inner = own_dict(made)
    if inner is not None:
        inner.update({name: rebuilt(item, leaf, built) for name, item in vars(value).items()})
    for name, item in attributes(value).items() if is_object(value) else ():
        if inner is None or name not in inner:  # a slot
            object.__setattr__(made, name, rebuilt(item, leaf, built))
    return made


def is_built(value: Any) -> bool:
    """Whether `rebuilt` makes another one; a leaf stays."""
    if isinstance(value, (list, tuple, deque, dict)) and not isinstance(value, torch.Size):
        return True
    return is_object(value) and not isinstance(value, nn.Module) and not callable(value)
