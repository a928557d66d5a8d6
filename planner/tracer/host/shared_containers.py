"""Lists and dictionaries that a call leaves in two places: in its output and in Python state, or twice in Python state."""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import CaptureError
from planner.tracer.host.arguments import WRITTEN, Returned, WrittenArguments, nodes_of, outermost
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import Preserved
from planner.tracer.host.state import HostState, Ref, walk
from planner.tracer.host.values import members
from planner.tracer.host.written_values import Built, is_built


def returned_state(
    output: Any, model: nn.Module, host: HostState, preserved: Preserved | None, arguments: WrittenArguments
) -> tuple[Returned, ...]:
    """The containers in an output that the call is given, or that the model's Python state holds as the call leaves it.

    A planned call returns those, and no copies, so that what the caller writes into them is seen in both places.

    Args:
        host: what Python does beside the kernels.
        preserved: Python state as it was before the call; None where no forward was recorded.
        arguments: of the call.

    Raises:
        CaptureError: a container is held elsewhere, and what the forward reads does not lead to it; or the forward leaves a new
            one twice in Python state.
    """
    given = arguments.returned(output)
    inside = [(steps, value) for steps, value in nodes_of(output) if pytree.children(value) is not None]
    if not inside and not host.effects:
        return given
    before = _held_before(preserved)
    _check_left_once(model, host, before, arguments)
    places: dict[int, Path] = {}
    roots = (*(path for path, _ in host.key.expected), *(effect.path for effect in host.effects))
    for place, value in _walked(roots, model, host) if inside else ():
        places.setdefault(id(value), place)
    found = outermost((*given, *((steps, places[id(value)]) for steps, value in inside if id(value) in places)))
    for steps, value in inside:
        is_elsewhere = id(value) in before or id(value) in arguments.nodes
        if is_elsewhere and not any(steps[: len(outer)] == outer for outer, _ in found):
            raise CaptureError(
                f"the model's forward returns a {type(value).__name__} that is kept elsewhere, too. A plan would return a new "
                "one, and what the caller writes there would be lost. Return a copy: dict(...), list(...), copy.copy(...)"
            )
    return found


def held_containers(model: nn.Module, host: HostState, preserved: Preserved | None) -> Built:
    """Containers and objects that Python state held before the call and holds still, each with a Ref to its place.

    Where a call leaves one of them at another place, too, a planned call leaves that one, and no copy.
    """
    set_anew = [effect.path for effect in host.effects if not (effect.appends or effect.replaces)]
    if not host.effects:
        return {}
    before, found = _held_before(preserved), Built()
    roots = (*(path for path, _ in host.key.expected), *(e.path for e in host.effects if e.appends or e.replaces))
    for place, value in _walked(roots, model, host):
        is_held = id(value) in before and is_built(value) and not isinstance(value, (tuple, torch.Tensor))
        if is_held and id(value) not in found and not any(place.is_inside(path) for path in set_anew):
            found[id(value)] = value, Ref("container", place)
    return found


def _held_before(preserved: Preserved | None) -> set[int]:
    """Identities of what Python state held before the call, and of what functions have cached."""
    held = preserved.held if preserved is not None else ()
    caches = [value for value in held if isinstance(value, functools._lru_cache_wrapper)]
    cached = gc.get_referents(*caches)
    return {id(value) for value in (*held, *cached, *gc.get_referents(*(one for one in cached if type(one) is dict)))}


def _check_left_once(model: nn.Module, host: HostState, before: set[int], arguments: WrittenArguments) -> None:
    """Raise CaptureError where the call leaves one new container at two places, one of which a plan does not build with it."""
    found: dict[int, list[Path]] = {}
    for place, value in _walked([effect.path for effect in host.effects], model, host):
        if type(value) in WRITTEN and id(value) not in before:
            found.setdefault(id(value), []).append(place)
    several = {key: places for key, places in found.items() if len({*places}) > 1}
    built = _built([effect.live(model) for effect in host.effects], arguments) if several else {}
    for key, places in several.items():
        if built[key] < len({*places}):
            kind = type(places[0].get(model)).__name__
            raise CaptureError(
                f"the model's forward leaves one new {kind} at {places[0].place} and at {places[1].place}, "
                "where a plan would leave two. Leave it at one place, and a copy at the other"
            )


def _built(left: Iterable[Any], arguments: WrittenArguments) -> Counter[int]:
    """In how many places of what is left each container stands that a plan builds once for all of them, by identity."""
    found: Counter[int] = Counter()
    todo = [arguments.marked(value) for value in left]
    while todo:
        value = todo.pop()
        if isinstance(value, (Ref, torch.Tensor)) or not is_built(value):
            continue
        found[id(value)] += 1
        if found[id(value)] == 1 or isinstance(value, tuple):
            todo += [item for _, item in members(value, lambda _, __: True)]
    return found


def _walked(roots: Iterable[Path], model: nn.Module, host: HostState) -> Iterator[tuple[Path, Any]]:
    names, seen = dict.fromkeys(map(id, model.modules()), ""), set[int]()
    for root in roots:
        yield from walk(root, root.get(model), host.key.reads, names, seen)
