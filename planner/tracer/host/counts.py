"""Numbers that a forward counts in Python (`self.num_calls += 1`), and that steer it by comparisons alone.

A further real forward finds a `Tracked` number in each place that holds one. It does with these what Python does with numbers,
and notes how every new number follows from those found, and how each comparison came out. A plan computes the new numbers
likewise, and is for calls whose comparisons come out alike. A number that is used in another way (by a kernel, as an index,
as text) cannot be repeated: the model is refused.
"""

from __future__ import annotations

import gc
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import CaptureError
from planner.tracer.host.path import Path

Number = int | float
Expression = tuple[Any, ...]
"""("found", i): the number in the i-th place; ("number", n); or (an operator's name, its operands)."""

_BINARY = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "and_": "&",
    "or_": "|",
    "xor": "^",
    "lshift": "<<",
    "rshift": ">>",
}
_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_UNARY = {"neg": "-", "pos": "+", "abs": "abs ", "invert": "~"}
_USES: dict[str, Callable[..., Any]] = {
    "__index__": operator.index,
    "__int__": int,
    "__float__": float,
    "__complex__": complex,
    "__round__": round,
    "__trunc__": math.trunc,
    "__floor__": math.floor,
    "__ceil__": math.ceil,
    "__hash__": hash,
    "__str__": str,
    "__repr__": repr,
    "__format__": format,
    "__divmod__": divmod,
    "__rdivmod__": lambda one, other: divmod(other, one),
}
"""What gives the value away."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers that a forward counts.

    Attributes:
        places: where they are.
        found: what the captured call found there.
        after: what it leaves there.
        conditions: (comparison, how it came out) of those that Python asked for.
    """

    places: tuple[Path, ...] = ()
    found: tuple[Number, ...] = ()
    after: tuple[Expression, ...] = ()
    conditions: tuple[tuple[Expression, bool], ...] = ()

    def difference(self, now: Sequence[Any]) -> tuple[str, str, str] | None:
        """Where a call finds what this was not captured for: (what, its value, the captured one).

        Args:
            now: what it finds in each place.
        """
        for path, number, captured in zip(self.places, now, self.found, strict=True):
            if type(number) is not type(captured):
                return str(path), type(number).__name__, type(captured).__name__
        for condition, expected in self.conditions:
            if bool(evaluated(condition, now)) is not expected:
                return self.text(condition), str(not expected), str(expected)
        return None

    def text(self, expression: Expression) -> str:
        """As Python writes it."""
        kind, *rest = expression
        if kind == "found":
            return str(self.places[rest[0]])
        if kind == "number":
            return repr(rest[0])
        inner = [self.text(part) if part[0] in ("found", "number") else f"({self.text(part)})" for part in rest]
        if len(inner) == 1:
            return f"{_UNARY.get(kind, 'bool ')}{inner[0]}"
        return f"{inner[0]} {(_BINARY | _COMPARED)[kind]} {inner[1]}"


def read_counts(counts: Counts, model: nn.Module) -> list[Any]:
    """What a call finds in each place."""
    return [path.get(model) for path in counts.places]


def evaluated(expression: Expression, found: Sequence[Number]) -> Any:
    """What an expression is for these numbers, as Python computes it."""
    kind, *rest = expression
    if kind == "found":
        return found[rest[0]]
    if kind == "number":
        return rest[0]
    compute = bool if kind == "bool" else getattr(operator, kind)
    return compute(*(evaluated(part, found) for part in rest))


def is_number(value: Any) -> bool:
    """One of Python's own numbers, and no bool."""
    return type(value) in (int, float)


class _Tape:
    """What becomes of the tracked numbers of one forward.

    Attributes:
        conditions: as of Counts.
        used: how the value of one was used, if it was.
    """

    def __init__(self) -> None:
        self.conditions: dict[Expression, bool] = {}
        self.used = ""
        self._alive: list[weakref.ref[Any]] = []

    def tracked(self, value: Any, expression: Expression) -> Any:
        if not is_number(value):  # complex, or an error that Python returns
            self.used = f"it becomes a {type(value).__name__}"
            return value
        made = Tracked(self, value, expression)
        self._alive.append(weakref.ref(made))
        return made

    def num_alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self._alive)


NO_COUNTS = Counts()


def _part(value: Any) -> Expression:
    return value._expression if isinstance(value, Tracked) else ("number", value)


def _plain(value: Any) -> Any:
    return value._value if isinstance(value, Tracked) else value


class Tracked:
    """A number in a place that a forward counts in; see the module. It is none of Python's own, whose kernels ask no method."""

    __slots__ = ("__weakref__", "_expression", "_tape", "_value")

    def __init__(self, tape: _Tape, value: Number, expression: Expression) -> None:
        self._tape, self._value, self._expression = tape, value, expression

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # `isinstance(number, int)` is true, as of the number
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._value, name)
        self._tape.used = f"its {name} is asked for"
        return found

    def __bool__(self) -> bool:
        self._tape.conditions[("bool", self._expression)] = bool(self._value)
        return bool(self._value)


def _binary(name: str, *, reflected: bool) -> Callable[[Any, Any], Any]:
    def compute(self: Any, other: Any) -> Any:
        one, two = (other, self) if reflected else (self, other)
        value = getattr(operator, name)(_plain(one), _plain(two))
        if not is_number(_plain(other)) and type(other) is not bool:
            self._tape.used = f"it is combined with a {type(other).__name__}"
            return value
        return self._tape.tracked(value, (name, _part(one), _part(two)))

    return compute


def _compared(name: str) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        value = getattr(operator, name)(self._value, _plain(other))
        if is_number(_plain(other)) or type(other) is bool:
            self._tape.conditions[(name, self._expression, _part(other))] = value
        elif name not in ("eq", "ne") or isinstance(other, torch.Tensor):  # a number equals no text, and not None
            self._tape.used = f"it is compared with a {type(other).__name__}"
        return value

    return compare


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda self: self._tape.tracked(getattr(operator, name)(self._value), (name, self._expression))


def _use(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    def use(self: Any, *rest: Any) -> Any:
        self._tape.used = f"{name} of it is asked for"
        return compute(self._value, *rest)

    return use


for _name in _BINARY:
    _dunder = _name.rstrip("_")
    setattr(Tracked, f"__{_dunder}__", _binary(_name, reflected=False))
    setattr(Tracked, f"__r{_dunder}__", _binary(_name, reflected=True))
for _name in _COMPARED:
    setattr(Tracked, f"__{_name}__", _compared(_name))
for _name in _UNARY:
    setattr(Tracked, f"__{_name}__", _unary(_name))
for _name, _compute in _USES.items():
    setattr(Tracked, _name, _use(_name, _compute))


@contextmanager
def numbers_tracked(model: nn.Module, before: Mapping[Path, Any], places: Sequence[Path]) -> Iterator[_Tape]:
    """While entered, these places hold tracked numbers, as `before` has them; at exit they hold what they held."""
    tape, held = _Tape(), [path.get(model) for path in places]
    for i, path in enumerate(places):
        path.set(model, tape.tracked(before[path], ("found", i)))
    try:
        yield tape
    finally:
        for path, value in zip(places, held, strict=True):
            path.set(model, value)


def refuse_tracked(output: Any) -> None:
    """Raise CaptureError where a forward returns a tracked number: a plan would return one value for ever."""
    if any(type(leaf) is Tracked for leaf in pytree.tree_leaves(output)):
        raise CaptureError("the model returns a number that it counts")


def counts_of(tape: _Tape, model: nn.Module, before: Mapping[Path, Any], places: Sequence[Path]) -> Counts | None:
    """What was counted, at the end of a tracked forward; None where a number was used in another way.

    Args:
        before: what the forward found in its places.
    """
    after: list[Expression] = []
    for path in places:
        now = path.get(model)
        if type(now) is Tracked:
            after.append(now._expression)
        elif is_number(now):
            after.append(("number", now))
        else:
            return None
    if tape.used:
        return None
    return Counts(tuple(places), tuple(before[path] for path in places), tuple(after), tuple(tape.conditions.items()))
