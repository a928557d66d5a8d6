"""Trace a step with equal blocks once; the whole model where that might change the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn

from planner.log import TRACER
from planner.tracer.units.refused import Refused
from planner.tracer.units.trace import Units

T = TypeVar("T")
_TRIES = 2


def trace(model: nn.Module, apart: Collection[str], traced: Callable[[Units], T]) -> tuple[T, dict[str, tuple[str, ...]]]:
    """Trace one unit of every kind, or the whole model; what `traced` returns, and names of the units of every kind.

    Args:
        apart: submodules that no unit may contain.
        traced: traces the model and replaces the stand-ins (`Units.spliced`).

    Raises:
        Exception: what `traced` raises without units.
    """
    name = type(model).__name__
    left_out: set[str] = set()
    for _ in range(_TRIES):
        units = Units(model, apart, left_out)
        if not units:
            break
        try:
            found = traced(units)
        except Refused as refused:
            TRACER.info("%s: equal blocks are traced again: %s", name, refused)
            if not refused.units:
                break
            left_out.update(refused.units)
        except Exception as error:
            if not units.changed_trace:
                raise
            TRACER.info(
                "%s: the whole model is traced: with equal blocks traced once, %s: %s", name, type(error).__name__, error
            )
            break
        else:
            _log(name, units)
            return found, _repeats(model, units)
    return traced(Units(model, apart, None)), {}


def _repeats(model: nn.Module, units: Units) -> dict[str, tuple[str, ...]]:
    """Names of the units of every kind, which is named after its class."""
    found: dict[str, tuple[str, ...]] = {}
    seen: Counter[str] = Counter()
    for kind in units.kinds:
        of_class = type(model.get_submodule(kind.template)).__name__
        seen[of_class] += 1
        number = seen[of_class]
        found[of_class if number == 1 else f"{of_class} ({number})"] = (kind.template, *kind.members)
    return found


def _log(name: str, units: Units) -> None:
    for kind in units.kinds:
        TRACER.info(
            "%s: %d equal blocks captured once: %s and %s", name, 1 + len(kind.members), kind.template, ", ".join(kind.members)
        )
    once = {unit for kind in units.kinds for unit in (kind.template, *kind.members)}
    for unit, reason in {**units.different, **units.left_out}.items():
        if unit in once:
            continue
        TRACER.info("%s: %s is captured by itself: %s", name, unit, reason)
