"""Lists and dictionaries among a call's arguments that its forward writes into. Each call has others in these places."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import CaptureError
from planner.tracer.host.fingerprint import Fingerprint, alike
from planner.tracer.host.path import Path
from planner.tracer.host.scopes import ARGUMENTS
from planner.tracer.host.state import Effect, HostState, Ref, bare_fingerprint, same_build, walk
from planner.tracer.host.values import ABSENT, PathStep, is_object, is_plain, items_of, member, members
from planner.tracer.host.written_values import rebuilt, with_member

WRITTEN = (dict, OrderedDict, defaultdict, list, deque)
"""Containers that a plan can write into; `type` is one of these."""
CONTAINERS = (*WRITTEN, tuple)


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
    held = [(container, copy.copy(container)) for _, container in _containers(args, kwargs) if type(container) in WRITTEN]
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


class Aliases:
    """Whether lists and dictionaries among a call's arguments stand in other places, too, that show what is written.

    In the captured call they do not.

    Attributes:
        compares_identities: the forward asks whether two objects are the same one: then all of the call's count.
    """

    def __init__(self, model: nn.Module, host: HostState) -> None:
        paths = (*host.state, *(effect.path for effect in host.effects if effect.path.scope is not ARGUMENTS))
        inner = [Path(path.module, path.name, path.steps[:i], path.scope) for path in paths for i in range(len(path.steps))]
        self._are_written = bool(argument_effects(host))
        if self._are_written:  # then every container matters that the forward reads
            names, seen = dict.fromkeys(map(id, model.modules()), ""), set[int]()
            roots = (path for path, _ in host.key.expected)
            read = (place for root in roots for place in walk(root, root.root(model), host.key.reads, names, seen))
            inner += [path for path, value in read if type(value) in WRITTEN]
        self.compares_identities = host.key.compares_identities
        self._model, self._inner = model, tuple(dict.fromkeys(inner)) if host.effects else ()

    def found(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """One stands in two places of the call, or in Python state that the forward writes into or reads tensors of."""
        if not (self._are_written or self._inner or self.compares_identities):
            return False
        containers = [container for _, container in _containers(args, kwargs)]
        given = [id(container) for container in containers if type(container) in WRITTEN]
        if self.compares_identities:
            given += [id(item) for container in containers for _, item in items_of(container) if is_object(item)]
        is_shared = (self._are_written or self.compares_identities) and len(given) > len({*given})
        return is_shared or not {*given}.isdisjoint(id(path.get(self._model)) for path in self._inner)


def _containers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """Python's own containers in a call, outer ones first, each with its place."""
    places = {name: Path("", name, scope=ARGUMENTS) for name in ("args", "kwargs")}
    return [*_containers_in(places["args"], args, ()), *_containers_in(places["kwargs"], kwargs, ())]


def _containers_in(path: Path, value: Any, outer: tuple[int, ...]) -> Iterator[tuple[Path, Any]]:
    """`outer`: identities of those that this value is inside of; a list may hold itself."""
    if type(value) in CONTAINERS and id(value) not in outer:
        yield path, value
        for key, item in items_of(value):
            yield from _containers_in(path.inside(("item", key)), item, (*outer, id(value)))


Returned = tuple[tuple[PathStep, ...], Path]
"""A container that the forward returns and others hold: steps to it from the output, and its place among the arguments or in
Python state."""


def nodes_of(tree: Any) -> Iterator[tuple[tuple[PathStep, ...], Any]]:
    """Everything in an output, or in a call, but tensors and tuples, with the steps that lead there; outer ones first."""
    todo: list[tuple[tuple[PathStep, ...], Any]] = [((), tree)]
    while todo:
        steps, value = todo.pop(0)
        if isinstance(value, torch.Tensor):
            continue
        if not isinstance(value, tuple):
            yield steps, value
        held = pytree.children(value)
        if held is not None:
            direct = set(map(id, held))
            todo += [((*steps, step), item) for step, item in members(value, lambda _, __: True) if id(item) in direct]


def outermost(found: Iterable[Returned]) -> tuple[Returned, ...]:
    """Those that are not inside of others before them."""
    kept: list[Returned] = []
    for steps, path in found:
        if not any(steps[: len(outer)] == outer for outer, _ in kept):
            kept.append((steps, path))
    return tuple(kept)


def _is_container(value: Any) -> bool:
    return not isinstance(value, (tuple, torch.Tensor)) and pytree.children(value) is not None


def with_returned(output: Any, returned: Sequence[Returned], containers: Sequence[Any]) -> Any:
    """An output that holds these containers where the forward returns them."""
    for (steps, _), container in zip(returned, containers, strict=True):
        output = _put(output, steps, container)
    return output


def _put(value: Any, steps: tuple[PathStep, ...], new: Any) -> Any:
    return with_member(value, steps[0], _put(member(value, steps[0]), steps[1:], new)) if steps else new


class WrittenArguments:
    """What a forward writes into the arguments of one call, whose containers it alone is given.

    Attributes:
        places: of the call's lists, dictionaries and objects, by identity.
        nodes: identities of everything that it is given but tensors and tuples, inside of other containers too.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], known: Sequence[torch.Tensor] | None = None) -> None:
        """`known`: the model's weights, and tensors of the call; None: leaves of autograd are not looked at."""
        self._known = None if known is None else set(map(id, known))
        self._made: set[int] = set()
        self._kept = [(path, container, items_of(container)) for path, container in _containers(args, kwargs)]
        self.places = {id(container): path for path, container, _ in self._kept if type(container) in WRITTEN}
        self.places |= {
            id(item): path.inside(("item", key))
            for path, _, items in self._kept
            for key, item in items
            if is_object(item) or isinstance(item, nn.Module) or _is_container(item)
        }
        self.nodes = {id(node) for _, node in nodes_of((args, kwargs))}
        inner = [(value, pytree.tree_flatten(value)) for _, _, items in self._kept for _, value in items]
        self._others = [(value, *flat) for value, flat in inner if type(value) not in CONTAINERS]

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
        self._made.clear()
        for path, container, before in reversed(self._kept):  # inner ones first, while their paths still lead to them
            of = self._of_dictionary if isinstance(container, dict) else self._of_list
            effects += of(path, container, before)
        for effect in effects:
            self._check(effect.path, effect.template)
        return tuple(effects)

    def written_since(self, written: Sequence[Effect]) -> Callable[[], bool]:
        """A function that says whether more was written than this, which `found` said before."""
        places = [effect.path for effect in written]
        return lambda: [effect.path for effect in self.found()] != places

    def returned(self, output: Any) -> tuple[Returned, ...]:
        """The call's own containers in an output."""
        inside = list(nodes_of(output))
        if any(id(value) in self._made for _, value in inside):
            raise _refusal("a list or dictionary that it returns, too")
        return outermost((steps, self.places[id(value)]) for steps, value in inside if id(value) in self.places)

    def marked(self, template: Any) -> Any:
        """What a forward leaves in Python state, with Refs in place of the call's own containers."""
        if id(template) in self.places:
            return Ref("container", self.places[id(template)])
        if type(template) not in CONTAINERS:
            return template
        steps = [("item", key) for key, _ in items_of(template)]
        marks = {step: self.marked(member(template, step)) for step in steps}
        if all(mark is member(template, step) for step, mark in marks.items()):
            return template
        made = copy.copy(template)
        for step, mark in marks.items():
            made = with_member(made, step, mark)
        return made

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
        if type(value) in CONTAINERS:
            if id(value) in self.places:
                raise _refusal(f"{path.place}, where it puts, or moves, another of the call's own containers")
            if id(value) in self._made:
                raise _refusal(f"{path.place}, where it puts a list or dictionary that it puts elsewhere, too")
            if type(value) in WRITTEN:
                self._made.add(id(value))
            for _, item in items_of(value):
                self._check(path, item)
        elif not (isinstance(value, torch.Tensor) or is_plain(value) or value is ABSENT):
            raise _refusal(f"{path.place}, where it puts a {type(value).__name__}")
        elif self._known is not None and _is_leaf(value) and id(value) not in self._known:
            raise _refusal(f"{path.place}, where it puts a new tensor that gets a gradient of its own")


def call_effects(
    effects: Sequence[Effect], before: Sequence[Effect], last: Sequence[Effect], arguments: WrittenArguments
) -> tuple[Effect, ...]:
    """All effects of a call: those on Python state, with Refs to the call's own containers, and those on its arguments.

    Args:
        effects: on Python state, of the last call.
        before, last: what two calls wrote into their arguments, as of `WrittenArguments.found`.
        arguments: those of the last one.

    Raises:
        CaptureError: the two wrote other plain values, or into other places.
    """
    for effect, again in zip_longest(before, last):
        if effect is None or again is None or effect.path != again.path:
            raise _refusal(f"{(effect or again).path.place} at some calls alone")
        if not same_build(effect.template, again.template) or not alike(*map(_plain_values, (effect, again))):
            raise _refusal(f"{effect.path.place} another value at each call")
    marked = [replace(effect, template=arguments.marked(effect.template)) for effect in effects]
    return (*marked, *last)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad


def _plain_values(effect: Effect) -> Fingerprint:
    return bare_fingerprint(rebuilt(effect.template, lambda leaf: None if isinstance(leaf, torch.Tensor) else leaf))


def _refusal(where: str) -> CaptureError:
    return CaptureError(
        f"the model's forward writes into its arguments in a way that a plan does not repeat: into {where}. Let it "
        "write into a copy: dict(argument), list(argument), copy.copy(argument)"
    )
