"""Which submodules are units: those that the user names, the repeated blocks, or the largest that can be captured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

from torch import nn

from planner.errors import InputError
from planner.tracer.units.choice import candidates
from planner.units import kind, shown

Units = str | type[nn.Module] | Collection[str] | Collection[type[nn.Module]] | None
"""What users give as `units`: qualified names, classes, or None."""


class Largest:
    """The type of LARGEST."""


LARGEST = Largest()
"""In place of names: the largest submodules that can be captured."""
_EXAMPLE = "give qualified names, units=('encoder.0', 'encoder.1'), or a class, units=Block"


def named_units(model: nn.Module, units: Units) -> tuple[str, ...]:
    """Qualified names of the submodules that the user wants as units, in the order of the model.

    A submodule that the model holds at several places has the first of its names.

    Raises:
        InputError: they name nothing, or one lies inside another; says what there is.
    """
    given: tuple[Any, ...]
    if isinstance(units, (str, type)):
        given = (units,)
    elif isinstance(units, Collection) and not isinstance(units, (bytes, dict)):
        given = tuple(units)
    else:
        raise InputError(f"units is {kind(units)}: {_EXAMPLE}")
    if not given:
        raise InputError(f"units is empty: {_EXAMPLE}, or leave it out for the repeated blocks")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    wanted: dict[nn.Module, None] = {}
    for one in given:
        if isinstance(one, str):
            wanted[_known(one, modules)] = None
        elif isinstance(one, type) and issubclass(one, nn.Module):
            wanted |= dict.fromkeys(_of_class(model, one))
        else:
            raise InputError(f"units holds {kind(one)}: {_EXAMPLE}")
    first, inside = {module: name for name, module in model.named_modules()}, _inside(wanted)
    for module in wanted:
        if module in inside:
            pair = f"{first[module]} lies inside {first[inside[module]]}"
            raise InputError(f"units: {pair}; a unit is planned as a whole, so give one of the two")
    return tuple(name for module, name in first.items() if module in wanted)


def _known(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    if name in modules:
        return modules[name]
    if not name:
        raise InputError("units holds '', the model itself, which planner.plan plans as a whole: name its submodules")
    close = get_close_matches(name, modules, n=3) or list(modules)[:3]
    there = f"; did you mean {' or '.join(map(repr, close))}?" if close else ": it has none"
    raise InputError(f"units: the model has no submodule {shown(name)}{there}")


def _of_class(model: nn.Module, wanted: type[nn.Module]) -> list[nn.Module]:
    """The outermost submodules of a class."""
    submodules = [module for name, module in model.named_modules() if name]
    found = [module for module in submodules if isinstance(module, wanted)]
    if not found:
        counts = Counter(type(module).__name__ for module in submodules)
        listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(5))
        raise InputError(f"units: no submodule of the model is a {wanted.__name__}; it has {listed or 'no submodules'}")
    inside = _inside(found)
    return [module for module in found if module not in inside]


def _inside(modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """The submodules of these modules, and a module that each lies in."""
    return {inner: outer for outer in modules for inner in outer.modules() if inner is not outer}


def repeated(model: nn.Module) -> tuple[str, ...]:
    """The repeated blocks: submodules of one class in one container, of which unit capture may trace one for all."""
    return tuple(candidates(model, ()).values())


def largest(model: nn.Module) -> tuple[str, ...]:
    """The model's own submodules; where one cannot be captured, its own take its place."""
    return tuple(name for name, _ in model.named_children())
