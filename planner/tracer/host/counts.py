"""Numbers that a forward counts in Python (`self.num_calls += 1`), and that steer it by comparisons alone.

`tracked` finds out how. A plan does the same operations with the numbers that a call finds, and is for calls in which every
comparison gives what it gave in the captured one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from planner.tracer.host.fingerprint import Difference
from planner.tracer.host.path import Path

Number = int | float
Operand = tuple[str, Any]
"""("found", i): the number in the i-th place; ("made", i): what the i-th operation gives; ("number", n)."""

ARITHMETIC = {
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
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
UNARY = {"neg": "-{}", "pos": "+{}", "abs": "abs({})", "invert": "~{}", "truth": "bool({})"}
_LONGEST_TEXT = 60


@dataclass(frozen=True, slots=True)
class Operation:
    """One that Python did with numbers.

    Attributes:
        name: in the module `operator`.
        operands: in order.
        gives: how a comparison came out; the class of the number that arithmetic made (`2 ** -1` is a float).
    """

    name: str
    operands: tuple[Operand, ...]
    gives: bool | type

    @property
    def is_comparison(self) -> bool:
        """It asks something of numbers, and makes none."""
        return isinstance(self.gives, bool)


@dataclass(frozen=True, slots=True)
class Counts:
    """How a forward counts numbers.

    Attributes:
        places: where they are.
        captured: what the captured call found there.
        operations: what Python did, in order.
        left: what the call leaves in each place.
    """

    places: tuple[Path, ...] = ()
    captured: tuple[Number, ...] = ()
    operations: tuple[Operation, ...] = ()
    left: tuple[Operand, ...] = ()

    @property
    def has_comparisons(self) -> bool:
        """The numbers steer the forward."""
        return any(operation.is_comparison for operation in self.operations)

    def found(self, model: nn.Module) -> list[Any]:
        """What a call finds in each place."""
        return [path.get(model) for path in self.places]

    def is_apart(self, model: nn.Module) -> bool:
        """The places are different ones: no list, dictionary or object holds two of them under one name."""
        inner = [path for path in self.places if path.steps]
        return len(inner) < 2 or len({(id(path.holder.get(model)), path.steps[-1]) for path in inner}) == len(inner)

    def follow(self, found: Sequence[Any]) -> list[Number] | Difference:
        """What a call leaves in each place, or why it does something else than the captured one.

        Args:
            found: what it finds there.

        Raises:
            Exception: whatever an operation raises, which the forward would raise, too.
        """
        for path, number, captured in zip(self.places, found, self.captured, strict=True):
            if type(number) is not type(captured):
                return Difference(str(path), type(captured).__name__, type(number).__name__)
        made: list[Any] = []
        value = lambda operand: operand[1] if operand[0] == "number" else (found, made)[operand[0] == "made"][operand[1]]
        for operation in self.operations:
            made.append(getattr(operator, operation.name)(*map(value, operation.operands)))
            if (made[-1] if operation.is_comparison else type(made[-1])) is not operation.gives:
                return Difference(self._text(("made", len(made) - 1)), str(operation.gives), str(made[-1]))
        return [value(operand) for operand in self.left]

    def _text(self, operand: Operand) -> str:
        """The number as Python would write it; of a long computation its last step alone."""
        kind, which = operand
        if kind != "made":
            return str(self.places[which]) if kind == "found" else repr(which)
        operation = self.operations[which]
        parts = [self._text(part) if part[0] != "made" else f"({self._text(part)})" for part in operation.operands]
        parts = [part if len(part) <= _LONGEST_TEXT else "(...)" for part in parts]
        if len(parts) == 1:
            return UNARY[operation.name].format(*parts)
        return f"{parts[0]} {(ARITHMETIC | COMPARISONS)[operation.name]} {parts[1]}"


NO_COUNTS = Counts()


def is_number(value: Any) -> bool:
    """One of Python's own numbers, and no bool."""
    return type(value) in (int, float)
