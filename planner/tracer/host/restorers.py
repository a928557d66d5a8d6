"""How to restore one container, object, variable or generator, by its kind."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from planner._compat.dispatch import untraced
from planner._compat.fake_tensors import FakeTensor
from planner._compat.private_names import TENSOR_HOOKS
from planner._compat.tensors import storage_id
from planner.tracer.faults import calls_users_code
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.foreign import is_foreign_namespace
from planner.tracer.host.generators import generator_state, set_numpy_state
from planner.tracer.host.iterators import guard_in_place
from planner.tracer.host.values import ABSENT, MODULE_STATE, attributes, is_array, is_object, items_of, own_class, own_dict

_COPIED_BYTES = 2**26
"""Larger numpy arrays are not copied; a forward that writes into one is seen by its fingerprint."""


def restore_tensors(contents: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write back the contents of tensors that have changed; the others keep their version, which a backward may check."""
    with untraced(), torch.no_grad():  # recorders must not see this write
        for tensor, content in contents:
            if tensor.shape == content.shape and (isinstance(tensor, FakeTensor) or not same_bits(tensor, content)):
                tensor.data.copy_(content)  # no new version: an autograd graph that saved the tensor may be alive


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Two tensors of one shape and dtype are equal in every bit."""
    if one.is_quantized:
        return torch.equal(one, other)
    return torch.equal(*(_as_bytes(tensor.detach()) for tensor in (one, other)))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def form_of(tensor: torch.Tensor) -> object:
    """What the form of a strided tensor is."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def unguarded_of(tensor: torch.Tensor) -> object:
    """What guards do not compare of where a strided tensor is in its memory, and how it is read from there."""
    return tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def memory_of(tensor: torch.Tensor) -> object:
    """Which memory a strided tensor has, and how it is laid out there."""
    return storage_id(tensor), form_of(tensor), unguarded_of(tensor)


def restorer(value: Any, where: str | None) -> Callable[[], bool] | None:
    """Function that restores a container's or an object's content; returns whether it had changed. None if it cannot change.

    `where`: its place, for messages; iterators that it holds are replaced by guarded ones. None: they are not.
    """
    if isinstance(value, (list, deque, dict, set, bytearray)):
        return _restorer_of_container(value, where)
    if isinstance(value, types.FunctionType):
        return _restorer_of_function(value, where)
    if isinstance(value, functools.partial):
        return _restorer_of_partial(value, where)
    if isinstance(value, functools._lru_cache_wrapper):
        return _restorer_of_cache(value)
    if is_generator(value):
        return _restorer_of_generator(value)
    if isinstance(value, ContextVar):
        held = value.get(ABSENT)  # one without a value cannot be put back: whoever runs a forward does so in a copied context
        if where is not None:
            guard_in_place(held, f"the context variable {value.name}", value.set)
        return lambda: held is not ABSENT and value.get(ABSENT) is not held and bool(value.set(held))
    if is_array(value) and hasattr(type(value), "__setitem__"):
        return _restorer_of_array(value)
    if isinstance(value, type):
        return _restorer_of_class(value, where)
    if isinstance(value, types.ModuleType) and not is_foreign_namespace(value):
        return _restorer_of_python_module(value, where)
    is_leaf = isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
    if is_leaf or isinstance(value, (nn.Module, nn.Parameter)) or is_object(value):
        return _restorer_of_object(value, where)
    return None


def _restorer_of_container(value: Any, where: str | None) -> Callable[[], bool]:
    content = _shallow(value)
    kept = dict(own_dict(value) or {})
    for key, item in _items(value) if where is not None else ():
        guard_in_place(item, f"{where}[{key!r}]", functools.partial(value.__setitem__, key))

    def restore() -> bool:
        changed = not _same_items(value, content)
        if changed:
            _refill(value, content)
        return _restore_dict(value, kept) or changed

    return restore


def _restore_dict(value: Any, content: dict[str, Any]) -> bool:
    """Give an object's own dictionary this content again; whether it had another."""
    inner = own_dict(value)
    if inner is None or _same_items(inner, content):
        return False
    inner.clear()
    inner.update(content)
    return True


def _refill(value: Any, content: Any) -> None:
    """Give a container this content, by the methods of Python's own class: a class derived from it may forbid `update`."""
    kind = own_class(value)
    kind.clear(value)
    if isinstance(value, dict):
        for key, item in content.items():
            kind.__setitem__(value, key, item)
    else:
        (set.update if kind is set else kind.extend)(value, content)


def _restorer_of_array(value: Any) -> Callable[[], bool] | None:
    """Of numpy's, or of the standard library's."""
    everything = slice(None) if isinstance(value, array) else ...
    if len(value) * value.itemsize > _COPIED_BYTES if isinstance(value, array) else value.nbytes > _COPIED_BYTES:
        return None
    content = copy.copy(value)

    def restore() -> bool:
        changed: bool = value.tobytes() != content.tobytes()
        if changed:
            value[everything] = content
        return changed

    return restore


def _restorer_of_cache(value: Any) -> Callable[[], bool]:
    before = value.cache_info()

    def restore() -> bool:
        now = value.cache_info()
        if now.currsize != before.currsize or now.misses != before.misses:
            value.cache_clear()  # entries made while capturing cannot be removed alone
        return False

    return restore


def _shallow(value: Any) -> Any:
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, dict):
        return dict(items_of(value))
    items = [item for _, item in items_of(value)]
    return set(items) if isinstance(value, set) else items


def _items(value: Any) -> list[tuple[Any, Any]]:
    return items_of(value) if isinstance(value, (dict, list, deque)) else []


def _same_items(value: Any, content: Any) -> bool:
    if isinstance(value, (set, bytearray)):
        return bool(own_class(value).__eq__(value, content))
    pairs = list(zip_longest(items_of(value), items_of(content)))
    if isinstance(value, dict):
        return all(a is not None and b is not None and a[0] is b[0] and a[1] is b[1] for a, b in pairs)
    return all(a is not None and b is not None and a[1] is b[1] for a, b in pairs)


def _restorer_of_partial(value: functools.partial[Any], where: str | None) -> Callable[[], bool]:
    parts = (value.func, value.args, value.keywords)
    put = lambda args: value.__setstate__((value.func, args, value.keywords, vars(value)))  # type: ignore[attr-defined]
    if where is not None:
        guard_in_place(value.args, f"{where}.args", put)

    def restore() -> bool:
        changed = value.func is not parts[0] or value.args is not parts[1]
        if changed:
            value.__setstate__((*parts, vars(value)))  # type: ignore[attr-defined]  # its attributes are read-only
        return changed

    return restore


def _restorer_of_function(value: types.FunctionType, where: str | None) -> Callable[[], bool]:
    cells = [(cell, content_of(cell)) for cell in value.__closure__ or ()]
    held, defaults = dict(vars(value)), (value.__defaults__, value.__kwdefaults__)
    if where is not None:
        for cell, content in cells:
            place = f"a closure variable of {value.__qualname__}"
            guard_in_place(content, place, functools.partial(setattr, cell, "cell_contents"))
        guard_in_place(defaults[0], f"a default of {value.__qualname__}", functools.partial(setattr, value, "__defaults__"))

    def restore() -> bool:
        changed = False
        for cell, content in cells:
            if content is not ABSENT and content_of(cell) is not content:
                cell.cell_contents = content
                changed = True
        if value.__defaults__ is not defaults[0] or value.__kwdefaults__ is not defaults[1]:
            value.__defaults__, value.__kwdefaults__ = defaults
            changed = True
        if not _same_items(vars(value), held):
            vars(value).clear()
            vars(value).update(held)
            changed = True
        return changed

    return restore


def content_of(cell: types.CellType) -> Any:
    """What a closure's cell holds; ABSENT for a name that is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _restorer_of_torch_generator(value: torch.Generator) -> Callable[[], bool]:
    with untraced():  # inside a trace these would be fake tensors
        state = value.get_state()

    def restore() -> bool:
        with untraced():
            changed = not torch.equal(value.get_state(), state)
            value.set_state(state)
        return changed

    return restore


def _restorer_of_generator(value: Any) -> Callable[[], bool]:
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.getstate() != state and not value.setstate(state)  # type: ignore[func-returns-value]
    if isinstance(value, torch.Generator):
        return _restorer_of_torch_generator(value)
    content = generator_state(value)

    def restore() -> bool:
        changed = repr(generator_state(value)) != repr(content)
        if changed:
            set_numpy_state(value, content)
        return changed

    return restore


def _restorer_of_class(value: type, where: str | None) -> Callable[[], bool]:
    held = dict(vars(value))
    for name, item in held.items() if where is not None else ():
        with contextlib.suppress(TypeError, AttributeError):
            guard_in_place(item, f"{value.__name__}.{name}", functools.partial(setattr, value, name))

    def restore() -> bool:
        now, changed = dict(vars(value)), False
        for name in held.keys() | now.keys():
            if name not in _PATCHED and held.get(name, ABSENT) is not now.get(name, ABSENT):
                with contextlib.suppress(TypeError, AttributeError):
                    setattr(value, name, held[name]) if name in held else delattr(value, name)
                    changed = True
        return changed

    return restore


def _restorer_of_python_module(value: types.ModuleType, where: str | None) -> Callable[[], bool]:
    """Of its variables but modules inside of it: these stay imported."""
    variables = vars(value)
    data = lambda: {name: item for name, item in variables.items() if not isinstance(item, types.ModuleType)}
    held = data()
    if where is not None:
        for name, item in held.items():
            guard_in_place(item, f"{value.__name__}.{name}", functools.partial(variables.__setitem__, name))

    def restore() -> bool:
        now = data()
        for name in now.keys() - held.keys():
            del variables[name]
        variables.update({name: item for name, item in held.items() if now.get(name, ABSENT) is not item})
        return not _same_items(now, held)

    return restore


_PATCHED = ("__getattribute__", "__setattr__", "__call__", "__dict__", "__weakref__")
"""What recording itself changes on classes, and undoes."""


def _restorer_of_hooks(tensor: torch.Tensor, kind: str) -> Callable[[], bool]:
    held = getattr(tensor, kind)
    content = dict(held or {})

    def restore() -> bool:
        now = getattr(tensor, kind)
        if now is held and dict(now or {}) == content:
            return False
        if held is not None:
            held.clear()
            held.update(content)
        setattr(tensor, kind, held)
        return True

    return restore


@calls_users_code
def _restorer_of_object(value: Any, where: str | None) -> Callable[[], bool]:
    inner = own_dict(value) or {}
    held = dict(inner)
    slots = {name: item for name, item in attributes(value).items() if name not in held}
    if where is not None:
        for name, item in held.items():
            guard_in_place(item, f"{where}.{name}".lstrip("."), functools.partial(inner.__setitem__, name))
        for name, item in slots.items():
            guard_in_place(item, f"{where}.{name}".lstrip("."), functools.partial(object.__setattr__, value, name))

    state = [_restorer_of_container(held[kind], None) for kind in MODULE_STATE] if isinstance(value, nn.Module) else []
    state += [_restorer_of_hooks(value, kind) for kind in TENSOR_HOOKS] if isinstance(value, torch.Tensor) else []

    def restore() -> bool:
        restored = [restore_container() for restore_container in state]  # every one of them
        changed = _restore_dict(value, held) or any(restored)
        for name, item in slots.items():
            if getattr(value, name, ABSENT) is not item:
                object.__setattr__(value, name, item)
                changed = True
        own = own_dict(value) or {}
        for name in [name for name in attributes(value) if name not in slots and name not in own]:
            object.__delattr__(value, name)
            changed = True
        return changed

    return restore
