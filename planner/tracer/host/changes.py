"""Changes that a forward makes to Python state: tensors that a plan writes there, too; anything else is refused."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.errors import CaptureError
from planner.tracer.host.counts import is_number
from planner.tracer.host.fingerprint import Fingerprints, alike, described, is_generator
from planner.tracer.host.foreign import is_special
from planner.tracer.host.generators import generator_state
from planner.tracer.host.path import Path, named
from planner.tracer.host.state import Effect
from planner.tracer.host.values import ABSENT, attributes, hidden_in, is_array, is_object, is_plain, items_of, reachable


@dataclass(frozen=True)
class Changes:
    """What a forward changes.

    Attributes:
        effects: what is written; the templates hold the tensors of the last recording forward.
        moved: ids of tensors that existed before the forward and are stored in another place after it; of one call, also of
            those that it replaces.
        found: (place, what the forward finds there) of effects that find no tensor; empty for steady forwards.
        counted: places of numbers that are others after each call. A plan can count only some; see `host.counts`.
    """

    effects: tuple[Effect, ...] = ()
    moved: frozenset[int] = frozenset()
    found: tuple[tuple[Path, Any], ...] = ()
    counted: tuple[Path, ...] = ()


def find_changes(
    model: nn.Module,
    before: Mapping[Path, Any],
    after: Mapping[Path, Any],
    outside: Collection[int] = (),
    known: Collection[int] = (),
    inputs: Collection[int] = (),
    only_written: Callable[[Path], bool] = lambda path: False,
    finder: type[Finder] | None = None,
    stored: Sequence[Any] = (),
) -> Changes:
    """Compare two snapshots of successive forwards.

    Args:
        before, after: every place that the forward reads or writes, with its value.
        outside: identities of the tensors of Python state that kernels read.
        known: identities of weights and inputs.
        inputs: identities of the call's tensors, which every call replaces.
        only_written: whether every forward writes an attribute before reading it; planned calls then write it even if its
            value is equal.
        stored: what it writes elsewhere: into its arguments.
        finder: what decides which changes a plan may make; by default those that every call makes alike.

    Raises:
        CaptureError: something that is no tensor changes from call to call, or a container that cannot be written.
    """
    finds = (finder or Finder)(model, before, after, outside, inputs, only_written)
    effects = tuple(finds.find())
    old = {id(value) for value in before.values() if isinstance(value, torch.Tensor)} - set(known)
    templates = (*(effect.template for effect in effects), *stored)
    moved = frozenset(key for template in templates for key in _tensor_ids(template) if key in old) | finds.replaced
    return Changes(effects, moved, tuple(finds.found), tuple(finds.counted))


@dataclass(frozen=True)
class Frozen:
    """What an object that changes in place (a set, an array, a random generator) held when a snapshot was made."""

    kind: str
    content: Any


def frozen(value: Any) -> Any:
    """What a snapshot keeps of a value: the value itself, or what it holds now."""
    if is_generator(value):
        return Frozen(type(value).__name__, repr(generator_state(value)))
    if isinstance(value, (set, bytearray)) or is_array(value):
        return Frozen(type(value).__name__, Fingerprints({}, lambda _, __: False).of(value))
    return value


class Finder:
    """Finds what steady forwards change: each writes tensors to the same places, and plain values that stay the same."""

    def __init__(
        self,
        model: nn.Module,
        before: Mapping[Path, Any],
        after: Mapping[Path, Any],
        outside: Collection[int],
        inputs: Collection[int],
        only_written: Callable[[Path], bool],
    ) -> None:
        self._model, self._before, self._after, self._outside = model, before, after, outside
        self._inputs, self._only_written = inputs, only_written
        self.found: list[tuple[Path, Any]] = []
        self.replaced: set[int] = set()
        self.counted: list[Path] = []
        self._done: list[Path] = []
        self._lists: set[int] = set()
        held = {(_root(path), path.steps): id(value) for path, value in before.items()}
        self._members = {  # by identity of what holds them: a snapshot lists the items of a list at one of its places
            (held[_parent(path)], path.steps[-1]): value
            for path, value in before.items()
            if path.steps and _parent(path) in held
        }
        self._num_members = Counter(holder for holder, _ in self._members)
        self._modules = {id(module) for module in model.modules()}
        there = (*before.values(), *model.parameters(), *model.buffers())
        self._known = {id(value) for value in there if isinstance(value, torch.Tensor)}
        self._prints = Fingerprints(named(model), lambda _, name: not is_special(name))

    def find(self) -> Iterator[Effect]:
        """The effects; `found` and `replaced` are filled."""
        left: set[int] = set()
        for effect in self._changed():
            left.update(_container_ids(effect.template))
            yield effect
        for path, now in self._after.items():  # a new container of equal content, which is one that an effect leaves
            is_left = id(now) in left and self._before.get(path, ABSENT) is not now
            if is_left and not any(path.is_inside(done) for done in self._done):
                self._done.append(path)
                yield Effect(self._writable(path), now)

    def _changed(self) -> Iterator[Effect]:
        for path, now in self._after.items():
            if any(path.is_inside(done) for done in self._done):
                continue
            was = self._before.get(path, ABSENT)
            if was is not now and self._only_written(path) and self._leads_to_model(now):
                raise refusal(path, was, now, "it leads to the model, and a plan would leave the same one on copies of it")
            if (isinstance(now, torch.Tensor) and id(now) in self._inputs) or (
                now is not ABSENT and self._only_written(path) and self._equal(was, now)
            ):
                self._done.append(path)
                yield Effect(self._writable(path), now)
            elif was is now:
                yield from self._of_same_object(path, now)
            elif self._is_count(was, now):
                if was != now:
                    self._done.append(path)
                    self.counted.append(self._writable(path))
            elif not self._equal(was, now):
                yield self._of_other(path, was, now)
        for path in self._before.keys() - self._after.keys():
            if not any(path.is_inside(done) for done in self._done) and self._before[path] is not ABSENT:
                raise refusal(path, self._before[path], ABSENT)

    def _leads_to_model(self, value: Any) -> bool:
        """The value, which is no module, holds one of the model's."""
        if isinstance(value, (torch.Tensor, nn.Module)) or is_plain(value):
            return False
        return any(isinstance(inner, nn.Module) and id(inner) in self._modules for inner in reachable([value]))

    def _is_count(self, was: Any, now: Any) -> bool:
        return is_number(was) and is_number(now)

    def _of_same_object(self, path: Path, now: Any) -> Iterator[Effect]:
        """A list or deque that was changed in place: it may have grown."""
        if not isinstance(now, (list, deque)) or id(now) in self._lists:
            return  # a list in several places is compared in the first: a snapshot lists its items there
        self._lists.add(id(now))
        old = self._num_members[id(now)]
        new = [item for _, item in items_of(now)]
        if len(new) <= old:
            return
        kept = [self._members.get((id(now), ("item", i)), ABSENT) for i in range(old)]
        grown = new[old:]
        read = any(id(item) in self._outside for item in new)
        if read or any(a is not b for a, b in zip(kept, new, strict=False)):
            raise refusal(path, f"{old} items", f"{len(new)} items")
        self._done.append(path)
        self._check_appended(path, grown)
        yield Effect(path, grown, appends=True)

    def _check_appended(self, path: Path, items: list[Any]) -> None:
        """Raise CaptureError unless every call may append these: tensors, and what is the same for all of them."""
        for leaf in (leaf for item in items for leaf in _leaves(item)):
            if not isinstance(leaf, (torch.Tensor, str, int, float, bool, type(None))):
                raise refusal(path, "shorter", "longer")
            if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
                raise refusal(path, "shorter", f"longer by a {type(leaf).__name__}, which a plan would repeat")

    def _of_other(self, path: Path, was: Any, now: Any) -> Effect:
        """Something else in the same place. A list or deque is written as a whole: the loop may have emptied it meanwhile."""
        holder = path.holder
        held: Any = holder.get(self._model) if path.steps else None
        if isinstance(held, (list, deque)) and self._before.get(holder) is held:
            self._check_rest(holder)
            self._done.append(holder)
            return Effect(holder, list(held), replaces=True)  # type: ignore[arg-type]
        self._done.append(path)
        both = isinstance(was, torch.Tensor) and isinstance(now, torch.Tensor)
        return Effect(self._writable(path), now if both else self._fresh(path, was, now))

    def _check_rest(self, holder: Path) -> None:
        """Raise CaptureError where a list whose tensors change holds something else that does, too."""
        for path, now in self._after.items():
            was = self._before.get(path, ABSENT)
            if path == holder or not path.is_inside(holder) or was is now or self._equal(was, now):
                continue
            if not (isinstance(was, torch.Tensor) and isinstance(now, torch.Tensor)):
                self._fresh(path, was, now)

    def _equal(self, was: Any, now: Any) -> bool:
        """The same for Python: equal values without tensors in them."""
        if isinstance(now, Frozen) and isinstance(was, Frozen):
            return now.kind == was.kind and alike(was.content, now.content, copied=True)
        if isinstance(now, torch.Tensor) or isinstance(was, torch.Tensor):
            return False
        if _holds_tensors(now) or type(was) is not type(now):
            return False
        if not is_plain(now) and any(isinstance(one, torch.Tensor) and id(one) not in self._known for one in hidden_in(now)):
            return False
        return self._prints.equal(was, now)

    def _fresh(self, path: Path, was: Any, now: Any) -> Any:
        """A new container at each call: its template."""
        if type(was) is not type(now) or not _is_container(now):
            raise refusal(path, was, now)
        olds, news = list(_leaves(was)), list(_leaves(now))
        for old, new in zip(olds, news, strict=False):
            both = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
            if not both and not self._prints.equal(old, new):
                raise refusal(path, old, new)
        if len(olds) != len(news):
            raise refusal(path, f"{len(olds)} values", f"{len(news)} values")
        return now

    def _writable(self, path: Path) -> Path:
        if any(kind == "value" for kind, _ in path.steps):  # a context variable, whose value belongs to who runs the call
            raise refusal(path, "one tensor", "another")
        if any(kind == "class" for kind, _ in path.steps):  # which belongs to all objects of the class
            raise refusal(path, "a value of its class", "another")
        if not path.steps and path.scope is None:
            module = self._model.get_submodule(path.module)
            own = path.name in vars(module)
            if not own or not path.name.isidentifier():
                raise refusal(path, "a value of its class", "another")
        return path


def _root(path: Path) -> tuple[Any, ...]:
    return (path.module, path.name, id(path.scope.variables) if path.scope is not None else None)


def _parent(path: Path) -> tuple[Any, ...]:
    return (_root(path), path.steps[:-1])


def _is_container(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict, deque)):
        return not isinstance(value, torch.Size)
    return is_object(value) and not isinstance(value, nn.Module) and not callable(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) or not _is_container(value):
        yield value
        return
    if isinstance(value, dict):
        yield from value.keys()
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            yield from _leaves(item)
    for item in attributes(value).values() if hasattr(value, "__dict__") or not isinstance(value, (list, tuple, dict)) else ():
        yield from _leaves(item)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in _leaves(value))


def _tensor_ids(template: Any) -> Iterator[int]:
    yield from (id(leaf) for leaf in _leaves(template) if isinstance(leaf, torch.Tensor))


def _container_ids(template: Any) -> Iterator[int]:
    """Of the containers and objects in it; a tuple is the same as an equal one."""
    if isinstance(template, torch.Tensor) or not _is_container(template):
        return
    if not isinstance(template, tuple):
        yield id(template)
    items = template.values() if isinstance(template, dict) else template if isinstance(template, (list, tuple, deque)) else ()
    for item in (*items, *(attributes(template).values() if is_object(template) else ())):
        yield from _container_ids(item)


def _text(value: Any) -> str:
    if isinstance(value, Frozen):
        return f"a {value.kind}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if value is ABSENT:
        return "absent"
    text = described(Fingerprints({}, lambda _, __: False).of(value)) if not isinstance(value, str) else value
    return text[:80]


def refusal(path: Path, was: Any, now: Any, why: str = "") -> CaptureError:
    """The error for a change that no plan can make; `why`: why none can, where the change does not say it."""
    what = "global variable" if path.scope is not None else "attribute"
    return CaptureError(
        f"the model's forward changes its {what} {path.place} ({_text(was)} before, {_text(now)} after) from call to call"
        f"{f' ({why})' if why else ''}; a plan would repeat one value for ever. Keep it in a buffer, change it outside of the "
        "forward, or pass it as an argument",
        module=path.module,
    )
