"""What one call changes in the Python state that it finds, though others need not: it fills a cache, or sets a mode."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.tracer.host.changes import Finder, refusal
from planner.tracer.host.fingerprint import tensor_key
from planner.tracer.host.path import Path
from planner.tracer.host.state import Effect
from planner.tracer.host.values import ABSENT, is_plain, items_of
from planner.tracer.host.written_values import rebuilt


class OneCall(Finder):
    """Finds the changes of one call: plain values, and containers of tensors and plain values that it makes, as well."""

    def find(self) -> Iterator[Effect]:
        """The effects; `found` is filled with what a capture that runs after the call has to find again."""
        for effect in super().find():
            self._note_found(effect)
            yield effect

    def _note_found(self, effect: Effect) -> None:
        """Raise CaptureError where what the call found cannot be given to a later capture."""
        path, now = effect.path, effect.path.get(self._model)
        known = {id(value) for value in (*self._before.values(), *self._model.parameters())} | set(self._inputs)
        for part in parts(effect.template):
            if isinstance(part, torch.Tensor) and part.requires_grad and part.is_leaf and id(part) not in known:
                raise refusal(path, self._before.get(path, ABSENT), "a tensor that gets a gradient of its own")
        was = self._before.get(path, ABSENT)
        if effect.replaces:
            olds = [self._before.get(path.inside(("item", i)), ABSENT) for i in range(len(now))]
            self.replaced |= {id(old) for old in olds if isinstance(old, torch.Tensor)}
            return
        if effect.appends:
            was = copy.copy(now)
            while len(was) > len(now) - len(effect.template):
                was.pop()
        if isinstance(was, torch.Tensor):
            self.replaced.add(id(was))
        elif was is ABSENT or all(map(is_plain_part, parts(was))):
            self.found.append((path, rebuilt(was, lambda leaf: leaf)))
        elif not self._is_alike(was, now):
            raise refusal(path, was, now)

    def _is_alike(self, was: Any, now: Any) -> bool:
        """Of the same build, with tensors of the same form, or such as kernels read: these are inputs of the graph."""
        if isinstance(was, torch.Tensor):
            return id(was) in self._outside or (isinstance(now, torch.Tensor) and tensor_key(was) == tensor_key(now))
        if type(was) is not type(now) or type(was) not in _CONTAINERS:
            return is_plain(was) and is_plain(now)
        olds, news = items_of(was), items_of(now)
        same_places = [key for key, _ in olds] == [key for key, _ in news]
        return same_places and all(self._is_alike(old, new) for (_, old), (_, new) in zip(olds, news, strict=True))

    def _is_count(self, was: Any, now: Any) -> bool:
        return False  # such a call finds this number

    def _fresh(self, path: Path, was: Any, now: Any) -> Any:
        self._check_made(path, was, now)
        return now

    def _check_appended(self, path: Path, items: list[Any]) -> None:
        for item in items:
            self._check_made(path, "shorter", item)

    def _check_made(self, path: Path, was: Any, now: Any) -> None:
        """Raise CaptureError unless a plan can make this value at each call."""
        if not all(isinstance(part, torch.Tensor) or is_plain_part(part) for part in parts(now)):
            raise refusal(path, was, now)
        made = {id(part) for part in parts(now) if type(part) in _CONTAINERS and type(part) is not tuple}
        known = {id(value) for value in self._before.values()}
        if made & known:  # a plan would put another container into this place
            raise refusal(path, was, now)

    def _writable(self, path: Path) -> Path:
        if not path.steps and path.scope is None:
            buffers = vars(self._model.get_submodule(path.module))["_buffers"]
            if path.name in buffers and path in self._before and self._before[path] is not ABSENT:
                return path  # a buffer that was None
        return super()._writable(path)


_CONTAINERS = (list, tuple, dict, deque)


def parts(value: Any) -> Iterator[Any]:
    """A value, and every key and item of Python's own containers in it."""
    yield value
    if type(value) in _CONTAINERS:
        for key, item in items_of(value):
            yield key
            yield from parts(item)


def is_plain_part(part: Any) -> bool:
    """One of Python's own containers, or a plain value."""
    return type(part) in _CONTAINERS or is_plain(part)


_OF_MODULES = tuple(name for name, held in vars(nn.Module()).items() if isinstance(held, (dict, set)))


def registered(model: nn.Module) -> dict[str, list[Any]]:
    """What torch's own dictionaries and sets of each module hold: parameters, buffers, submodules, hooks."""
    found: dict[str, list[Any]] = {}
    for where, module in model.named_modules():
        for name in _OF_MODULES:
            held = vars(module)[name]
            pairs = [(key, id(item)) for key, item in held.items()] if isinstance(held, dict) else sorted(held)
            found[f"{where}.{name}".lstrip(".")] = pairs
    return found


def take_back(model: nn.Module, effects: Sequence[Effect], before: Mapping[Path, Any]) -> None:
    """Put back what was found at the places of these effects.

    Args:
        before: a snapshot of what was found.
    """
    for effect in reversed(effects):
        if effect.appends or effect.replaces:
            held = effect.path.get(model)
            items = [before.get(effect.path.inside(("item", i)), ABSENT) for i in range(len(held))]
            held.clear()
            held.extend(item for item in items if item is not ABSENT)
        else:
            effect.path.set(model, before.get(effect.path, ABSENT))
