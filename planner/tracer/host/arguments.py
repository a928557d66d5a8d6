"""Lists and dictionaries among a call's arguments that its forward writes into. Each call has others in these places."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import CaptureError
from planner.tracer.host.fingerprint import Fingerprint, alike
from planner.tracer.host.path import Path
from planner.tracer.host.scopes import ARGUMENTS
from planner.tracer.host.state import Effect, HostState, bare_fingerprint, same_build
from planner.tracer.host.values import ABSENT, PathStep, is_plain, items_of, member, rebuilt, with_member

_WRITTEN = (dict, OrderedDict, defaultdict, list, deque)
_CONTAINERS = (*_WRITTEN, tuple)


@contextmanager
def bound(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While entered, paths that start from arguments lead to these."""
    before, ARGUMENTS.variables = ARGUMENTS.variables, {"args": args, "kwargs": kwargs}
    try:
        yield
    finally:
        ARGUMENTS.variables = before


@contextmanager
def bound_and_restored(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """As `bound`; at exit, the lists and dictionaries hold again what they did. For calls on the side."""
    held = [(container, copy.copy(container)) for _, container in _containers(args, kwargs) if type(container) in _WRITTEN]
    with bound(args, kwargs):
        try:
            yield
        finally:
            for container, before in held:
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(before)


def argument_effects(host: HostState) -> tuple[Effect, ...]:
    """The effects of a forward on its call's arguments."""
    return tuple(effect for effect in host.effects if effect.path.scope is ARGUMENTS)


def is_shared(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """One list or dictionary stands in two places of the call."""
    found = [id(container) for _, container in _containers(args, kwargs) if type(container) in _WRITTEN]
    return len(found) > len({*found})


def _containers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Python's own containers in a call, outer ones first, each with its place."""
    todo = [(Path("", "args", scope=ARGUMENTS), args), (Path("", "kwargs", scope=ARGUMENTS), kwargs)]
    while todo:
        path, value = todo.pop(0)
        if type(value) in _CONTAINERS:
            yield path, value
            todo += [(path.inside(("item", key)), item) for key, item in items_of(value)]


def with_returned(output: Any, returned: Sequence[tuple[tuple[PathStep, ...], Path]], model: nn.Module) -> Any:
    """An output that holds the call's own containers where the forward returns these; see `WrittenArguments.returned`."""
    for steps, path in returned:
        output = _put(output, steps, path.get(model))
    return output


def _put(value: Any, steps: tuple[PathStep, ...], new: Any) -> Any:
    return with_member(value, steps[0], _put(member(value, steps[0]), steps[1:], new)) if steps else new


class WrittenArguments:
    """What a forward writes into the arguments of one call, whose containers it alone is given."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._kept = [(path, container, items_of(container)) for path, container in _containers(args, kwargs)]
        self._own = {id(container) for _, container, _ in self._kept}
        inner = [(value, pytree.tree_flatten(value)) for _, _, items in self._kept for _, value in items]
        self._others = [(value, *flat) for value, flat in inner if type(value) not in _CONTAINERS]

    def found(self) -> tuple[Effect, ...]:
        """How it has written, after the call; the templates hold the tensors of that call.

        Raises:
            CaptureError: it wrote what, or where, no plan can write.
        """
        for value, leaves, spec in self._others:
            now, spec_now = pytree.tree_flatten(value)
            if spec_now != spec or any(one is not other for one, other in zip(leaves, now, strict=True)):
                raise _refusal(f"a {type(value).__name__}")
        effects: list[Effect] = []
        for path, container, before in reversed(self._kept):  # what is inside of a container that is taken out comes first
            of = self._of_dictionary if isinstance(container, dict) else self._of_list
            effects += of(path, container, before)
        for effect in effects:
            self._check(effect.path, effect.template)
        return tuple(effects)

    def returned(self, output: Any) -> tuple[tuple[tuple[PathStep, ...], Path], ...]:
        """The call's own containers in an output: (steps from the output, place among the arguments)."""
        places = {id(container): path for path, container, _ in self._kept}
        found: list[tuple[tuple[PathStep, ...], Path]] = []
        todo: list[tuple[tuple[PathStep, ...], Any]] = [((), output)]
        while todo:
            steps, value = todo.pop(0)
            if type(value) not in _CONTAINERS:
                continue
            if id(value) in places and type(value) in _WRITTEN:
                found.append((steps, places[id(value)]))
            else:
                todo += [((*steps, ("item", key)), item) for key, item in items_of(value)]
        return tuple(found)

    def _of_dictionary(self, path: Path, now: Any, before: Sequence[tuple[Any, Any]]) -> Iterator[Effect]:
        old, new = dict(before), dict(items_of(now))
        kept = [key for key in old if key in new]
        if list(new) != [*kept, *(key for key in new if key not in old)]:
            raise _refusal(f"{path.place}, and changes the order of its keys")
        yield from (Effect(path.inside(("item", key)), ABSENT) for key in old if key not in new)
        for key, value in new.items():
            if key not in old or value is not old[key]:
                yield Effect(path.inside(("item", key)), value)

    def _of_list(self, path: Path, now: Any, before: Sequence[tuple[Any, Any]]) -> Iterator[Effect]:
        old, new = [item for _, item in before], [item for _, item in items_of(now)]
        changed = [i for i, (was, item) in enumerate(zip(old, new, strict=False)) if was is not item]
        if len(new) == len(old):
            yield from (Effect(path.inside(("item", i)), new[i]) for i in changed)
        elif len(new) > len(old) and not changed:
            yield Effect(path, new[len(old) :], appends=True)
        else:
            yield Effect(path, new, replaces=True)

    def _check(self, path: Path, value: Any) -> None:
        """Raise CaptureError unless a plan can make this value at each call."""
        if type(value) in _CONTAINERS:
            if id(value) in self._own:
                raise _refusal(f"{path.place}, where it puts another of the call's own containers")
            for _, item in items_of(value):
                self._check(path, item)
        elif not (isinstance(value, torch.Tensor) or is_plain(value) or value is ABSENT):
            raise _refusal(f"{path.place}, where it puts a {type(value).__name__}")


def check_alike(one: Sequence[Effect], other: Sequence[Effect]) -> None:
    """Raise CaptureError where two calls wrote other plain values into their arguments, or in other places."""
    paths = [[effect.path for effect in effects] for effects in (one, other)]
    if paths[0] != paths[1]:
        raise _refusal(str((paths[0] + paths[1])[0]))
    for effect, again in zip(one, other, strict=True):
        bare = [
            bare_fingerprint(rebuilt(e.template, lambda leaf: None if isinstance(leaf, torch.Tensor) else leaf))
            for e in (effect, again)
        ]
        if not same_build(effect.template, again.template) or not alike(*bare):
            raise _refusal(f"{effect.path.place}, another value at each call")


def _plain_values(effect: Effect) -> Fingerprint:
    return bare_fingerprint(rebuilt(effect.template, lambda leaf: None if isinstance(leaf, torch.Tensor) else leaf))


def _refusal(where: str) -> CaptureError:
    return CaptureError(
        f"the model's forward writes into {where}, which is among its arguments, in a way that a plan does not repeat. Let it "
        "write into a copy: dict(argument), list(argument), copy.copy(argument)"
    )
