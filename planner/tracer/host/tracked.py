"""Tracked numbers: a forward that finds them where it counts shows how it counts.

They do what Python does with numbers, and a tape notes every operation. A number that is used in another way (by a kernel, as
an index, as text) cannot be counted by a plan. The forward's own code runs instruction by instruction as with plain numbers, or
the difference is found: it may ask for the class of a number, which is another one.
"""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn

from planner._compat import pytree
from planner.tracer.host.counts import ARITHMETIC, COMPARISONS, UNARY, Counts, Number, Operand, Operation, is_number
from planner.tracer.host.path import Path
from planner.tracer.host.scopes import is_library_code

_OTHER_USES: dict[str, Callable[..., Any]] = {
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
"""Methods that hand the number itself to other code."""


class Tape:
    """What becomes of the tracked numbers of one forward.

    Attributes:
        operations: in order.
        use: how one was used otherwise; "" if none was.
    """

    def __init__(self, is_apart: Callable[[], bool]) -> None:
        """`is_apart`: whether a submodule is running that plans run as it is, before they write the numbers."""
        self._is_apart = is_apart
        self.operations: list[Operation] = []
        self.use = ""
        self._alive: list[weakref.ref[Any]] = []

    def number(self, value: Number, operand: Operand) -> Tracked:
        """A tracked number of this value."""
        made = Tracked(self, value, operand)
        self._alive.append(weakref.ref(made))
        return made

    def note(self, name: str, *operands: Any) -> Any:
        """Do an operation with numbers, tracked or plain; what it gives, tracked where it is a number.

        An error is raised as Python raises it, and noted: a call in which it does not come is another one.
        """
        try:
            value = getattr(operator, name)(*map(_plain, operands))
        except Exception as error:
            self.use = f"{name} of it raises {type(error).__name__}"
            raise
        if self._is_apart():
            self.use = "a submodule that runs as it is, or has hooks, uses it"
        is_comparison = name in COMPARISONS or name == "truth"
        self.operations.append(Operation(name, tuple(map(_operand, operands)), value if is_comparison else type(value)))
        if is_comparison:
            return value
        if not is_number(value):
            self.use = f"it becomes a {type(value).__name__}"
            return value
        return self.number(value, ("made", len(self.operations) - 1))

    def is_kept(self) -> bool:
        """A tracked number is still held somewhere."""
        alive = [ref for ref in self._alive if ref() is not None]
        if alive:  # as a rule none is: looking for cycles takes longer than the run
            gc.collect()
        return any(ref() is not None for ref in alive)

    def counts(self, model: nn.Module, before: Mapping[Path, Any], places: Sequence[Path]) -> Counts:
        """What was counted, at the end of the forward, with `use` set where a place holds no number.

        Args:
            before: what the forward found.
        """
        found = [path.get(model) for path in places]
        for value in found:
            if type(value) is not Tracked and not is_number(value):
                self.use = f"a {type(value).__name__} takes its place"
        left = tuple(map(_operand, found))
        return Counts(tuple(places), tuple(before[path] for path in places), tuple(self.operations), left)


def _operand(value: Any) -> Operand:
    return value._operand if type(value) is Tracked else ("number", value)


def _plain(value: Any) -> Any:
    return value._value if type(value) is Tracked else value


def note_returned(output: Any) -> None:
    """Note tracked numbers among the leaves of an output."""
    for leaf in pytree.tree_leaves(output):
        if type(leaf) is Tracked:
            leaf._tape.use = "the forward returns it"


class Tracked:
    """A number in a place that a forward counts in. No subclass of int or float: C code reads those without a method call."""

    __slots__ = ("__weakref__", "_operand", "_tape", "_value")

    def __init__(self, tape: Tape, value: Number, operand: Operand) -> None:
        self._tape, self._value, self._operand = tape, value, operand

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # `isinstance(number, int)` is true, as of the number
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._value, name)
        self._tape.use = f"its {name} is asked for"
        return found

    def __bool__(self) -> bool:
        return self._tape.note("truth", self)  # type: ignore[no-any-return]


def _binary(name: str, *, is_reflected: bool) -> Callable[[Any, Any], Any]:
    def compute(self: Any, other: Any) -> Any:
        operands = (other, self) if is_reflected else (self, other)
        if is_number(_plain(other)) or type(other) is bool:
            return self._tape.note(name, *operands)
        self._tape.use = f"it is combined with a {type(other).__name__}"
        return getattr(operator, name)(*map(_plain, operands))

    return compute


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    def compare(self: Any, other: Any) -> Any:
        if is_number(_plain(other)) or type(other) is bool:
            return self._tape.note(name, self, other)
        if not (name in ("eq", "ne") and type(other) in (str, type(None))):  # which no number equals
            self._tape.use = f"it is compared with a {type(other).__name__}"
        return getattr(operator, name)(self._value, other)

    return compare


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda self: self._tape.note(name, self)


def _other_use(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    def use(self: Any, *rest: Any) -> Any:
        self._tape.use = f"its {name} is asked for"
        return compute(self._value, *rest)

    return use


for _name in ARITHMETIC:
    _method = _name.rstrip("_")
    setattr(Tracked, f"__{_method}__", _binary(_name, is_reflected=False))
    setattr(Tracked, f"__r{_method}__", _binary(_name, is_reflected=True))
for _name in COMPARISONS:
    setattr(Tracked, f"__{_name}__", _comparison(_name))
for _name in UNARY.keys() - {"truth"}:
    setattr(Tracked, f"__{_name}__", _unary(_name))
for _name, _compute in _OTHER_USES.items():
    setattr(Tracked, _name, _other_use(_name, _compute))


Instructions = list[tuple[CodeType, int]]
"""Code and the offset in it, in the order in which they were executed."""


def compares_objects(instructions: Instructions) -> bool:
    """Code that was executed asks whether two objects are the same one (`n is m`); small numbers are, if they are equal."""
    return any(map(_compares_objects, {code for code, _ in instructions}))


@functools.lru_cache(maxsize=1024)
def _compares_objects(code: CodeType) -> bool:
    steps = itertools.pairwise(dis.get_instructions(code))
    constant = lambda step: step.opname == "LOAD_CONST" and step.argval in (None, True, False, ...)
    return any(step.opname == "IS_OP" and not constant(before) for before, step in steps)


@contextmanager
def instructions_noted() -> Iterator[Instructions]:
    """While entered, what Python executes of code that is no library's is noted, instruction by instruction."""
    noted: Instructions = []
    before = sys.gettrace()

    def on_event(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            package = str(frame.f_globals.get("__name__")).partition(".")[0]  # the methods of dataclasses are in no file
            if is_library_code(frame.f_code) or package in ("planner", "torch"):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            noted.append((frame.f_code, frame.f_lasti))
        return on_event

    sys.settrace(on_event)
    try:
        yield noted
    finally:
        sys.settrace(before)
