"""A value's fingerprint: equal exactly for values that a forward cannot distinguish; plain data that can be pickled."""

from __future__ import annotations

import datetime
import decimal
import fractions
import hashlib
import random
import re
import types
import uuid
from array import array
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, get_args

import torch
from torch import nn

from planner.tracer.host.foreign import is_foreign_class, package_of
from planner.tracer.host.values import ABSENT, Wanted, class_members, is_array, is_iterator, is_object, members

Fingerprint = Any
TensorKey = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device, bool]

_BY_VALUE = (bool, int, str, bytes, type(None))
_BY_TEXT = (float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, range, slice)
_IMMUTABLE = (
    datetime.date,
    datetime.timedelta,
    datetime.time,
    decimal.Decimal,
    fractions.Fraction,
    PurePath,
    uuid.UUID,
    re.Pattern,
)
_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType)
_ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.MethodDescriptorType)
"""What a deep copy does not copy."""
_LARGE_BYTES = 2**16
_NOTHING: Fingerprint = ("absent",)


def tensor_key(tensor: torch.Tensor) -> TensorKey:
    """The properties that decide which kernel runs: shape, strides, dtype, device, requires_grad."""
    strides = tensor.stride() if tensor.layout is torch.strided else (str(tensor.layout),)
    return (tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """An object that is compared by identity. It does not travel in pickles: there, what is of its kind counts as the same.

    Attributes:
        is_atomic: copies of a model share it.
        is_only_itself: none but this object is the same, so that none is after a pickle.
    """

    held: Any
    kind: str
    is_atomic: bool
    is_only_itself: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Same, (ABSENT, self.kind, False, self.is_only_itself)

    def __repr__(self) -> str:
        return self.kind if self.held is ABSENT else _short(self.held)


def everything() -> Fingerprints:
    """Fingerprints that look into every attribute; for one thread."""
    return Fingerprints({}, lambda _, name: True)


def of_argument(value: Any) -> Fingerprint:
    """The fingerprint of an object among a call's arguments, all attributes included."""
    return _OfArguments({}, lambda _, name: True).of(value)


def alike(expected: Fingerprint, now: Fingerprint, *, copied: bool = False) -> bool:
    """Whether two fingerprints are equal.

    `copied`: objects that a deep copy duplicates are compared by class, not by identity.
    """
    if isinstance(expected, Same) or isinstance(now, Same):
        if not (isinstance(expected, Same) and isinstance(now, Same)):
            return False
        if expected.held is now.held:
            return True
        loose = expected.held is ABSENT or (copied and not expected.is_atomic)
        return loose and not expected.is_only_itself and expected.kind == now.kind
    if type(expected) is not type(now):
        return False
    if isinstance(expected, tuple):
        return len(expected) == len(now) and all(alike(a, b, copied=copied) for a, b in zip(expected, now, strict=True))
    return bool(expected == now)


class Fingerprints:
    """Makes fingerprints of values.

    Args:
        names: of the model's own modules and tensors, by identity: they are compared by other checks.
        wanted: which attributes of objects count.
        skipped: identities of containers whose content does not count, and (identity, step) of members that do not.
    """

    def __init__(self, names: Mapping[int, str], wanted: Wanted, skipped: Collection[Any] = ()) -> None:
        self._names, self._wanted, self._skipped = names, wanted, skipped
        self._open: dict[int, int] = {}

    def of(self, value: Any) -> Fingerprint:
        """The fingerprint of a value."""
        kind = type(value)
        if kind in _BY_VALUE:
            return (kind.__name__, value)
        if kind in _BY_TEXT:
            return (kind.__name__, repr(value))
        if id(value) in self._names and isinstance(value, (nn.Module, torch.Tensor)):
            return ("the model's", self._names[id(value)])
        if isinstance(value, torch.Tensor):
            return ("tensor", kind.__name__, *tensor_key(value))
        if value is ABSENT:
            return _NOTHING
        if id(value) in self._skipped:
            return ("grows", kind.__name__)
        if isinstance(value, _IMMUTABLE):
            return (kind.__name__, repr(value))
        if id(value) in self._open:
            return ("again", self._open[id(value)])
        self._open[id(value)] = len(self._open)
        try:
            return self._of_object(value)
        finally:
            del self._open[id(value)]

    def equal(self, one: Any, other: Any) -> bool:
        """Whether the fingerprints of two values are alike, as copies are; each pair of members is compared once.

        Values share members (closures, registries): a fingerprint, which repeats a member wherever it occurs, may be endless.
        """
        todo, done = [(one, other)], dict[tuple[int, int], Any]()  # which holds the pair, so that no identity is used twice
        while todo:
            pair = todo.pop()
            if pair[0] is pair[1] or (id(pair[0]), id(pair[1])) in done:
                continue
            done[id(pair[0]), id(pair[1])] = pair
            if any(isinstance(value, Set) for value in pair):  # whose items have no order
                if not alike(self.of(pair[0]), self.of(pair[1]), copied=True):
                    return False
                continue
            heads = [_Head(self._names, self._wanted, self._skipped) for _ in pair]
            if not alike(*(head.of(value) for head, value in zip(heads, pair, strict=True)), copied=True):
                return False
            todo += zip(*(head.inner for head in heads), strict=True)
        return True

    def _of_object(self, value: Any) -> Fingerprint:
        kind = type(value)
        head = Same(kind, kind.__qualname__, True)
        if is_array(value):
            kind_of_items = value.typecode if isinstance(value, array) else str(value.dtype)
            return (head, kind_of_items, tuple(getattr(value, "shape", ())), _digest(value, kind_of_items))
        if isinstance(value, bytearray):
            return (head, bytes(value))
        if isinstance(value, Set):
            held = (*members(value, self._wanted), *class_members(value, self._wanted))
            own = tuple((step[1], self.of(item)) for step, item in held)
            return (head, tuple(sorted((self.of(item) for item in value), key=repr)), own)
        if isinstance(value, Enum):
            return (head, value.name, tuple((step[1], self.of(item)) for step, item in members(value, self._wanted)))
        if is_generator(value) or is_iterator(value):
            return (head,)  # their state is compared by `generator_state`
        every = [*members(value, self._wanted), *class_members(value, self._wanted)]
        if self._skipped:
            every = [(step, item) for step, item in every if (id(value), step) not in self._skipped]
        found = tuple((step[0], self.of(step[1]), self.of(item)) for step, item in every)
        if isinstance(value, types.FunctionType) and found:  # made again by the same code: the same, if its members are
            scope = ("attr", self.of("__globals__"), (Same(value.__globals__, "dict", True),))
            return (Same(value.__code__, value.__qualname__, True), (*found, scope))
        if isinstance(value, _ATOMIC):
            return (Same(value, kind.__qualname__, True), found)
        base = next((base for base in _VALUES if issubclass(kind, base)), None)
        if base is not None:  # of a class derived from Python's
            return (head, base.__repr__(value), found)
        if not found and not isinstance(value, (list, tuple, dict)) and not (is_object(value) and not is_foreign_class(kind)):
            return (Same(value, kind.__qualname__, False),)
        return (head, found)


class _OfArguments(Fingerprints):
    """A tensor inside of an object is no input of a plan: with another one, the call is another."""

    def of(self, value: Any) -> Fingerprint:
        """The fingerprint of a value."""
        if isinstance(value, torch.Tensor):
            own = tuple((name, self.of(held)) for name, held in vars(value).items())
            return (*super().of(value), Same(value, "another tensor", False, is_only_itself=True), own)
        return super().of(value)


class _Head(Fingerprints):
    """The fingerprint of a value without those of its members, which are in `inner`."""

    def __init__(self, names: Mapping[int, str], wanted: Wanted, skipped: Collection[Any] = ()) -> None:
        super().__init__(names, wanted, skipped)
        self.inner: list[Any] = []
        self._is_outermost = True

    def of(self, value: Any) -> Fingerprint:
        """The fingerprint of the first value; the following ones are its members."""
        if self._is_outermost:
            self._is_outermost = False
            return super().of(value)
        self.inner.append(value)
        return ("member",)


_OF_NUMPY = ("Generator", "RandomState", "BitGenerator", "SeedSequence")
"""Names of numpy's sources of random numbers."""


def is_generator(value: Any) -> bool:
    """A source of random numbers."""
    kind = type(value)
    if issubclass(kind, (random.Random, torch.Generator)):
        return True
    return any(package_of(base) == "numpy" and base.__name__ in _OF_NUMPY for base in kind.__mro__)


_VALUES = (str, bytes, int, float, complex)


def _digest(values: Any, kind: str) -> bytes:
    content: bytes = values.tobytes() if kind != "object" else repr(values.tolist()).encode()
    return content if len(content) <= _LARGE_BYTES else hashlib.sha256(content).digest()


def _short(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return value.co_qualname[:80]
    named = isinstance(value, (type, types.ModuleType, *_NAMED))
    name = (getattr(value, "__qualname__", None) or value.__name__) if named else type(value).__qualname__
    return str(name)[:80]


def described(found: Fingerprint) -> str:
    """A fingerprint for people, in at most 80 characters."""
    if isinstance(found, Same):
        return repr(found)
    if not isinstance(found, tuple) or not found:
        return repr(found)[:80]
    if found == _NOTHING:
        return "absent"
    head = found[0]
    if head == "tensor":
        return describe_tensor(_tensor_key_in(found))
    if head == "the model's":
        return f"the model's {found[1]}"
    if isinstance(head, str) and len(found) == 2:
        text = found[1] if head not in ("str", "int", "bool", "bytes", "NoneType") else repr(found[1])
        return str(text)[:80]
    return repr(head)[:80]


def _tensor_key_in(found: Fingerprint) -> TensorKey:
    """The `tensor_key` in a tensor's fingerprint, in which its class comes before, and may be which one it is behind."""
    return found[2 : 2 + len(get_args(TensorKey))]  # type: ignore[no-any-return]


def describe_tensor(key: Any) -> str:
    """'float32[8, 4] strides (4, 1) on cpu, requires_grad'."""
    shape, strides, dtype, device, requires_grad = key
    grad = ", requires_grad" if requires_grad else ""
    layout = f" strides {strides}" if strides else ""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}{layout} on {device}{grad}"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two fingerprints differ first.

    Attributes:
        where: the place, as Python writes it.
        planned, now: what was expected there, and what is there now, for people.
        is_absent: there is nothing there now.
        is_tensor: there is a tensor there now.
    """

    where: str
    planned: str
    now: str
    is_absent: bool = False
    is_tensor: bool = False


def tensor_difference(expected: TensorKey, now: TensorKey, path: str) -> Difference:
    """How a tensor differs from the expected one; where only `requires_grad` does, that alone is named."""
    if expected[:-1] == now[:-1]:
        return Difference(f"{path}.requires_grad", str(expected[-1]), str(now[-1]), is_tensor=True)
    return Difference(path, describe_tensor(expected), describe_tensor(now), is_tensor=True)


def first_difference(expected: Fingerprint, now: Fingerprint, path: str) -> Difference:
    """Where two fingerprints of the value at `path` differ first."""
    pair = (expected, now)
    if all(isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], tuple) for found in pair) and alike(
        expected[0], now[0]
    ):
        old, new = expected[1], now[1]
        if (old or new) and all(isinstance(row, tuple) and len(row) == 3 for row in (*old, *new)):
            if len(old) != len(new):
                return Difference(path, f"{len(old)} items", f"{len(new)} items")
            for (kind, key, one), (_, other_key, other) in zip(old, new, strict=True):
                if not alike(key, other_key):
                    return Difference(path, f"with {described(key)}", f"with {described(other_key)}")
                if not alike(one, other):
                    name = described(key)
                    inner = f"{path}[{name}]" if kind == "item" else f"{path}.{name.strip(chr(39))}"
                    return first_difference(one, other, inner)
    is_tensor = isinstance(now, tuple) and now[:1] == ("tensor",)
    if is_tensor and isinstance(expected, tuple) and expected[:1] == ("tensor",):
        old, new = _tensor_key_in(expected), _tensor_key_in(now)
        if old != new:
            return tensor_difference(old, new, path)
        if expected[1] != now[1]:
            return Difference(f"the class of {path}", expected[1], now[1], is_tensor=True)
    return Difference(path, described(expected), described(now), is_absent=now == _NOTHING, is_tensor=is_tensor)
