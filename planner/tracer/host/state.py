"""What of Python state a plan depends on or reads as tensors, and what a planned call writes back (Effect)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.tracer.host.counts import NO_COUNTS, Counts
from planner.tracer.host.fingerprint import Fingerprint, Fingerprints, TensorKey, alike
from planner.tracer.host.library_reads import LibraryRead
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved, keep_deep, keep_model
from planner.tracer.host.scopes import Reads
from planner.tracer.host.tensor_places import TensorRead
from planner.tracer.host.values import class_members, member, members
from planner.tracer.host.written_values import Built, rebuilt


def roots(
    model: nn.Module,
    attributes: Callable[[type], frozenset[str]],
    reads: Reads,
    opaque: Sequence[str],
    touched: Mapping[int, Collection[str]] | None = None,
) -> Iterator[Path]:
    """Every place to start from.

    Args:
        attributes: names per class.
        opaque: submodules that are left out, with all inside of them, except for attributes that others touch there.
        touched: attributes that others read or wrote, by identity of the module.
    """
    for module_name, module in model.named_modules():
        if any(module_name == name or module_name.startswith(f"{name}.") for name in opaque):
            yield from (Path(module_name, name) for name in sorted((touched or {}).get(id(module), ())))
        else:
            yield from (Path(module_name, name) for name in sorted(attributes(type(module))))
    for scope in reads.scopes:
        yield from (Path(scope.where, name, scope=scope) for name in sorted(scope.names))


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor, or one of the call's own containers, in a template.

    ("result", i) of the graph; ("input", i) of the call and, after these, of `HostState.state`; or ("weight", name); of a
    container: ("container", its path).
    """

    source: str
    key: Any


@dataclass(frozen=True, slots=True)
class Effect:
    """What a planned call writes into Python state after its forward.

    Attributes:
        path: where.
        template: what: a Ref, or a container that holds Refs.
        appends: the template's items are appended to the list or deque at `path`.
        replaces: they take the place of what it holds.
    """

    path: Path
    template: Any
    appends: bool = False
    replaces: bool = False

    def write(self, model: nn.Module, value_of: Callable[[Ref], Any], built: Built) -> None:
        """Write it.

        Args:
            value_of: the tensor, or the container among the arguments, that a Ref stands for.
            built: by the effects of this call before, and by this one: a container in several templates is one.
        """
        new = rebuilt(self.template, lambda leaf: value_of(leaf) if isinstance(leaf, Ref) else leaf, built)
        if self.replaces:
            self.path.get(model).clear()
        if self.appends or self.replaces:
            self.path.get(model).extend(new)
        else:
            self.path.set(model, new)

    def live(self, model: nn.Module) -> Any:
        """What a forward left there; of a list or deque that it fills or extends, the items that are its own."""
        live = self.path.get(model)
        if self.appends or self.replaces:
            return list(live)[-len(self.template) :] if self.template and isinstance(live, (list, deque)) else []
        return live


def written_containers(effects: Sequence[Effect], model: nn.Module) -> tuple[tuple[Path, type], ...]:
    """The containers and objects that effects write into, with their classes; not modules."""
    whole = [effect.path for effect in effects if effect.appends or effect.replaces]
    places = dict.fromkeys((*whole, *(effect.path.holder for effect in effects if effect.path.steps)))
    return tuple((place, type(place.get(model))) for place in places)


def written(effect: Effect, model: nn.Module) -> Iterator[tuple[Ref, Any]]:
    """The tensors that a forward left at an effect's place, each with its Ref in the template."""
    todo = [(effect.template, effect.live(model))]
    while todo:
        template, value = todo.pop()
        if isinstance(template, Ref):
            yield template, value
        elif not isinstance(template, torch.Tensor):
            todo += [(item, member(value, step)) for step, item in members(template, lambda _, __: True)]


@dataclass(frozen=True, slots=True)
class HostKey:
    """The Python state that a plan depends on.

    Attributes:
        reads: what the forward reads.
        expected: the fingerprint of every place it reads.
        opaque: names of opaque modules, whose state is not compared.
        left: places that the forward writes but that do not affect it, and lists that it appends to; not compared.
        environment: values of the environment variables it reads.
        tensors: what it reads of tensors beside their data and form.
        compares_identities: it asks whether two tensors are the same one.
        inputs_at: where it asks so, each tensor in Python state with the position of the call's tensor that it is, or None.
        weight_classes: of weights whose classes are not torch's, by name.
        libraries: what it reads of libraries.
        held_by_backward: places that lead to containers which code of the backward holds, under whatever name.
        containers: what effects write into, with its class: compared by this also where its contents are not.
    """

    reads: Reads
    expected: tuple[tuple[Path, Fingerprint], ...] = ()
    opaque: tuple[str, ...] = ()
    left: tuple[Path, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()
    tensors: tuple[TensorRead, ...] = ()
    compares_identities: bool = False
    inputs_at: tuple[tuple[Path, int | None], ...] = ()
    weight_classes: tuple[tuple[str, type], ...] = ()
    libraries: tuple[LibraryRead, ...] = ()
    held_by_backward: tuple[Path, ...] = ()
    containers: tuple[tuple[Path, type], ...] = ()


def skipped_places(left: Sequence[Path], model: nn.Module) -> frozenset[Any]:
    """What `Fingerprints` skips: id of a list or deque (its whole content), (id of a container, step) of a single member."""
    found: set[Any] = set()
    for path in left:
        if isinstance(path.get(model), (list, deque)):
            found.add(id(path.get(model)))
        if path.steps:
            found.add((id(path.holder.get(model)), path.steps[-1]))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class LazyValue:
    """A place that a first call changes, and later calls leave as they find it.

    Attributes:
        path: where.
        before: fingerprint of what a first call finds there.
        after: the value that it sets; plain, so that copies of the model share it.
    """

    path: Path
    before: Fingerprint
    after: Any

    def is_unset(self, model: nn.Module) -> bool:
        """Whether no call has set it yet."""
        return alike(self.before, bare_fingerprint(self.path.get(model)))

    def set(self, model: nn.Module) -> None:
        """Set it, as a first call does."""
        self.path.set(model, self.after)


@dataclass(frozen=True, slots=True)
class HostState:
    """What Python does beside the kernels of a forward.

    Attributes:
        key: what of Python's state the graph is right for.
        state: the places whose tensors are inputs of the graph, after the call's tensors.
        state_keys: shape, strides, dtype, device and requires_grad of each of these.
        state_storages: per place, the number of the first one whose tensor is in the same storage.
        shared: (place, number in `state`) of further places that hold the same tensors.
        aliases: (place, name) of weights that Python state holds outside of the modules' own dictionaries.
        effects: what the forward leaves in Python state.
        lazy: what a first call sets besides; the key holds once it is set.
        as_found: it is what one call does, which need not leave the state that it finds: the first one fills a cache.
        found: then (place, what the call finds there) of the effects that find plain values, or containers of such.
        counts: numbers that it counts, and how these steer it.
    """

    key: HostKey = HostKey(Reads({}, frozenset()))
    state: tuple[Path, ...] = ()
    state_keys: tuple[TensorKey, ...] = ()
    state_storages: tuple[int, ...] = ()
    shared: tuple[tuple[Path, int], ...] = ()
    aliases: tuple[tuple[Path, str], ...] = ()
    effects: tuple[Effect, ...] = ()
    lazy: tuple[LazyValue, ...] = ()
    as_found: bool = False
    found: tuple[tuple[Path, Any], ...] = ()
    counts: Counts = NO_COUNTS


def bare_fingerprint(value: Any) -> Fingerprint:
    """The fingerprint of a value without its attributes."""
    return Fingerprints({}, lambda _, __: False).of(value)


def remembered(model: nn.Module, key: HostKey) -> Preserved:
    """The Python state of a model, and what its forward reads besides, as it is now, to be restored."""
    preserved, objects = Preserved(), list[Any]()
    names = {id(module): "" for module in model.modules()}
    for scope in (*key.reads.scopes, *key.reads.opaque_scopes):
        for name in scope.names:
            preserved.keep_variable(scope.variables, name)
            objects += keep_deep(preserved, scope.variables.get(name), names, name)
    return keep_model(model, preserved, objects)


def walk(path: Path, value: Any, reads: Reads, names: Any, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    """Every place at and inside `path`, with its value; a container or object is entered once."""
    yield path, value
    if isinstance(value, torch.Tensor) or (id(value) in names and isinstance(value, nn.Module)):
        return
    inner = [*members(value, reads.wants), *class_members(value, reads.wants)]
    if not inner or id(value) in seen:
        return
    seen.add(id(value))
    for step, item in inner:
        yield from walk(path.inside(step), item, reads, names, seen)


def same_build(one: Any, other: Any) -> bool:
    """Two templates are of the same containers, with tensors (or Refs to tensors) in the same places."""
    is_tensor = [isinstance(value, (torch.Tensor, Ref)) for value in (one, other)]
    if any(is_tensor):
        return all(is_tensor)
    everything = lambda value, name: True
    mine, theirs = list(members(one, everything)), list(members(other, everything))
    if type(one) is not type(other) or [step for step, _ in mine] != [step for step, _ in theirs]:
        return False
    return all(same_build(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True))
