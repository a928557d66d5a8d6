"""Python state put back: containers, attributes, variables and generators are copied when first seen and restored in place."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from planner._torch import untraced
from planner.errors import CaptureError
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.generators import Generators, generator_state
from planner.tracer.host.values import ABSENT, attributes, is_iterator, is_object

_COPIED_BYTES = 2**26
"""Larger numpy arrays are not copied; a forward that writes into one is seen by its fingerprint."""


_READS_COPIES: ContextVar[bool] = ContextVar("reads_copies", default=False)


@contextlib.contextmanager
def iterators_copied() -> Iterator[None]:
    """Guarded iterators may be read inside, by opaque modules and operators: they get the items of a copy."""
    token = _READS_COPIES.set(True)
    try:
        yield
    finally:
        _READS_COPIES.reset(token)


class GuardedIterator:
    """Stands for an iterator while a model is run on the side: reading the iterator itself would use it up."""

    def __init__(self, held: Any, where: str) -> None:
        self.held, self.where = held, where
        self._copy: Any = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if _READS_COPIES.get():
            if self._copy is None:
                self._copy = self._copied()
            return next(self._copy)
        raise CaptureError(
            f"the model's forward reads an iterator ({self.where}, a {type(self.held).__name__}), which gives another item at "
            "each call; a plan would repeat one for ever. Pass the item to the model as an argument"
        )

    def _copied(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.14 no longer copies those of itertools
                return copy.deepcopy(self.held)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise CaptureError(
                f"the model's forward reads an iterator ({self.where}, a {type(self.held).__name__}), which cannot be copied, "
                "so that planning would use it up. Pass the item to the model as an argument"
            ) from error


class Preserved:
    """Python state as it was when it was first seen; `restore` puts it back, in place.

    Args:
        guards_iterators: until then, a `GuardedIterator` stands in the place of every iterator.
    """

    def __init__(self, *, guards_iterators: bool = True) -> None:
        self._guards_iterators = guards_iterators
        self._kept: dict[int, tuple[Any, Callable[[], bool]]] = {}
        self._variables: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}

    def keep(self, value: Any, where: str = "") -> bool:
        """Remember what this container or object holds; False where it holds nothing that can change, or is known."""
        if id(value) in self._kept:
            return False
        restore = _restorer(value, where if self._guards_iterators else None)
        if restore is None:
            return False
        self._kept[id(value)] = (value, restore)
        return True

    def keep_variable(self, scope: dict[str, Any], name: str) -> None:
        """Remember a global variable."""
        value = scope.get(name, ABSENT)
        self._variables.setdefault((id(scope), name), (scope, name, value))
        if self._guards_iterators and _is_used_up(value):
            scope[name] = GuardedIterator(value, f"the global variable {name}")

    @property
    def held(self) -> tuple[Any, ...]:
        """What is remembered."""
        return tuple(value for value, _ in self._kept.values())

    def restore(self) -> bool:
        """Put everything back; whether anything was not as it had been."""
        changed = False
        for scope, name, value in self._variables.values():
            if scope.get(name, ABSENT) is not value:
                _put_variable(scope, name, value)
                changed = True
        put_back = [restore() for _, restore in self._kept.values()]  # every one of them
        return any(put_back) or changed

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Put back, at the end, what is known now to what it is now; what is seen first inside stays remembered here."""
        now = Preserved()
        for value in self.held:
            now.keep(value)
        for scope, name, _ in self._variables.values():
            now.keep_variable(scope, name)
        try:
            yield
        finally:
            now.restore()


def _is_used_up(value: Any) -> bool:
    return is_iterator(value) and not isinstance(value, (GuardedIterator, io.IOBase))


def _put_variable(scope: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        scope.pop(name, None)
    else:
        scope[name] = value


def _restorer(value: Any, where: str | None) -> Callable[[], bool] | None:
    """What puts a container's or an object's content back."""
    if isinstance(value, (list, deque, dict, set, bytearray)):
        return _restorer_of_container(value, where)
    if isinstance(value, types.FunctionType):
        return _restorer_of_function(value, where)
    if isinstance(value, functools._lru_cache_wrapper):
        return _restorer_of_cache(value)
    if is_generator(value):
        return _restorer_of_generator(value)
    if isinstance(value, ContextVar):
        held = value.get(ABSENT)
        return lambda: value.get(ABSENT) is not held and bool(value.set(held))
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.nbytes <= _COPIED_BYTES:
        content = value.copy()
        return lambda: value.tobytes() != content.tobytes() and value.__setitem__(..., content) is None
    if isinstance(value, type):
        return _restorer_of_class(value)
    if isinstance(value, (nn.Module, nn.Parameter)) or is_object(value):
        return _restorer_of_object(value, where)
    return None


def _restorer_of_container(value: Any, where: str | None) -> Callable[[], bool]:
    content = _shallow(value)
    kept = dict(vars(value)) if hasattr(value, "__dict__") else None
    for key, item in _items(value):
        if where is not None and _is_used_up(item):
            value[key] = GuardedIterator(item, f"{where}[{key!r}]")

    def put_back() -> bool:
        changed = not _same_items(value, content)
        if changed:
            _refill(value, content)
        if kept is not None and not _same_items(vars(value), kept):
            vars(value).clear()
            vars(value).update(kept)
            changed = True
        return changed

    return put_back


def _refill(value: Any, content: Any) -> None:
    """Give a container this content, by the methods of Python's own class: a class derived from it may forbid `update`."""
    kind: Any = next(base for base in (OrderedDict, dict, set, list, deque) if isinstance(value, base))
    kind.clear(value)
    if isinstance(value, dict):
        for key, item in content.items():
            kind.__setitem__(value, key, item)
    else:
        (set.update if kind is set else kind.extend)(value, content)


def _restorer_of_cache(value: Any) -> Callable[[], bool]:
    before = value.cache_info()

    def put_back() -> bool:
        now = value.cache_info()
        if now.currsize != before.currsize or now.misses != before.misses:
            value.cache_clear()  # what was filled while capturing cannot be told from the rest
        return False

    return put_back


def _shallow(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, set):
        return set(value)
    return list(value) if isinstance(value, (list, deque)) else bytes(value)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, deque)) else []


def _same_items(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        pairs = zip(value.items(), content.items(), strict=True)
        return all(k is j and v is w for (k, v), (j, w) in pairs)
    if isinstance(value, set):
        return bool(value == content)
    return all(a is b for a, b in zip(value, content, strict=True)) if not isinstance(value, bytearray) else value == content


def _restorer_of_function(value: types.FunctionType, where: str | None) -> Callable[[], bool]:
    cells = [(cell, _content(cell)) for cell in value.__closure__ or ()]
    held = dict(vars(value))
    for cell, content in cells:
        if where is not None and _is_used_up(content):
            cell.cell_contents = GuardedIterator(content, f"a closure variable of {value.__qualname__}")

    def put_back() -> bool:
        changed = False
        for cell, content in cells:
            if content is not ABSENT and _content(cell) is not content:
                cell.cell_contents = content
                changed = True
        if not _same_items(vars(value), held):
            vars(value).clear()
            vars(value).update(held)
            changed = True
        return changed

    return put_back


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _restorer_of_torch_generator(value: torch.Generator) -> Callable[[], bool]:
    with untraced():  # inside a trace these would be fake tensors
        state = value.get_state()

    def put_back() -> bool:
        with untraced():
            changed = not torch.equal(value.get_state(), state)
            value.set_state(state)
        return changed

    return put_back


def _restorer_of_generator(value: Any) -> Callable[[], bool]:
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.getstate() != state and not value.setstate(state)  # type: ignore[func-returns-value]
    if isinstance(value, torch.Generator):
        return _restorer_of_torch_generator(value)
    content = generator_state(value)

    def put_back() -> bool:
        changed = repr(generator_state(value)) != repr(content)
        if hasattr(value, "bit_generator"):
            value.bit_generator.state = content
        else:
            value.set_state(content)
        return changed

    return put_back


def _restorer_of_class(value: type) -> Callable[[], bool]:
    held = dict(vars(value))

    def put_back() -> bool:
        now, changed = dict(vars(value)), False
        for name in held.keys() | now.keys():
            if name not in _PATCHED and held.get(name, ABSENT) is not now.get(name, ABSENT):
                with contextlib.suppress(TypeError, AttributeError):
                    setattr(value, name, held[name]) if name in held else delattr(value, name)
                    changed = True
        return changed

    return put_back


_PATCHED = ("__getattribute__", "__setattr__", "__call__", "__dict__", "__weakref__")
"""What recording itself changes on classes, and undoes."""


def _restorer_of_object(value: Any, where: str | None) -> Callable[[], bool]:
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    slots = {name: item for name, item in attributes(value).items() if name not in held}
    for name, item in held.items():
        if where is not None and _is_used_up(item):
            vars(value)[name] = GuardedIterator(item, f"{where}.{name}".lstrip("."))

    def put_back() -> bool:
        changed = hasattr(value, "__dict__") and not _same_items(vars(value), held)
        if changed:
            vars(value).clear()
            vars(value).update(held)
        for name, item in slots.items():
            if getattr(value, name, ABSENT) is not item:
                object.__setattr__(value, name, item)
                changed = True
        own = vars(value) if hasattr(value, "__dict__") else {}
        for name in [name for name in attributes(value) if name not in slots and name not in own]:
            object.__delattr__(value, name)
            changed = True
        return changed

    return put_back


@contextlib.contextmanager
def contents_preserved(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put the contents of tensors back at the end."""
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, content in contents:
                if tensor.shape == content.shape and not torch.equal(tensor, content):  # a write counts as a new version
                    tensor.copy_(content)


def keep_model(model: nn.Module, preserved: Preserved, objects: Sequence[Any] = ()) -> Preserved:
    """Remember a model's attributes, and the containers and objects that they, or `objects`, lead to."""
    names = {id(module): "" for module in model.modules()}
    todo: list[Any] = [*model.modules(), *objects]
    followed: set[int] = set()
    while todo and len(followed) < _MOST_OBJECTS:
        item = todo.pop()
        if id(item) not in followed:
            followed.add(id(item))
            preserved.keep(item, type(item).__name__)
            for held in list(attributes(item).values()):
                todo += keep_deep(preserved, held, names)
    return preserved


_MOST_OBJECTS = 20_000
"""Objects followed from a model at most: some lead to everything there is."""


def keep_deep(preserved: Preserved, value: Any, names: Mapping[int, str], where: str = "") -> list[Any]:
    """Remember a value and the containers and functions it is made of; returns the objects met, whose attributes are not.

    `names`: modules of the model, by identity, which are remembered apart.
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
            continue
        preserved.keep(item, place)
        if isinstance(item, dict):
            todo += [(inner, f"{place}[{key!r}]") for key, inner in item.items()]
        elif isinstance(item, (list, tuple, deque, set, frozenset)) and not isinstance(item, torch.Size):
            todo += [(inner, f"{place}[{i}]") for i, inner in enumerate(item)]
        elif isinstance(item, types.FunctionType):
            todo += [(_content(cell), place) for cell in item.__closure__ or ()]
            todo += [(held, place) for held in (item.__defaults__, item.__kwdefaults__, vars(item)) if held]
        elif isinstance(item, types.MethodType):
            todo += [(item.__self__, place), (item.__func__, place)]
        elif isinstance(item, functools.partial):
            todo += [(held, place) for held in (item.func, item.args, item.keywords)]
        elif isinstance(item, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            todo.append((item.__wrapped__, place))
        elif isinstance(item, property):
            todo.append((item.fget, place))
        elif isinstance(item, ContextVar):
            todo.append((item.get(ABSENT), place))
    return objects


@contextlib.contextmanager
def model_preserved(
    model: nn.Module, tensors: Sequence[torch.Tensor] = (), *, guards_iterators: bool = True
) -> Iterator[Preserved]:
    """Put back, at the end, what running a model may change: attributes, containers, objects in them, generators, `tensors`.

    What is yielded says with `restore()` whether something of it was changed so far.
    """
    preserved = keep_model(model, Preserved(guards_iterators=guards_iterators))
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with Generators(device).preserved(), contents_preserved(tensors):
        try:
            yield preserved
        finally:
            preserved.restore()
