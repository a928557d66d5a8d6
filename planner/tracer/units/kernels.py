"""The kernels that a unit's forward calls: recorded of a template, compared with those of other units without running them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from planner._compat import pytree
from planner._compat.dispatch import TorchDispatchMode, written
from planner._compat.units import blank, has_saved_tensor_hooks
from planner.kernels.calls import like
from planner.tracer.host.kernels import HOST_READS
from planner.tracer.units.choice import Form, is_plain
from planner.tracer.units.refused import Refused

_TENSOR: Any = torch.Tensor
_UNSAFE = frozenset(
    {
        _TENSOR.register_hook,
        _TENSOR.register_post_accumulate_grad_hook,
        _TENSOR.retain_grad,
        _TENSOR.requires_grad_,
        _TENSOR.backward,
        _TENSOR.grad_fn.__get__,
        _TENSOR.grad.__get__,
        _TENSOR.is_leaf.__get__,
        _TENSOR.requires_grad.__set__,
        _TENSOR.data.__set__,
        torch.autograd.grad,
        torch.autograd.backward,
    }
)
"""What changes or reads the graph of autograd beside the kernels."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which tensor: ("argument", position), ("weight", name), or (number of the call that made it, which of its results)."""

    source: str | int
    index: str | int
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class New:
    """A tensor that a call makes."""

    form: Form
    offset: int


@dataclass(slots=True)
class KernelLog:
    """The calls of one forward.

    Attributes:
        calls: kernels and autograd functions with their arguments: tensors by place, other values by value.
        results: what each of them returned, with tensors as `New`, or by place.
    """

    calls: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


class _Places:
    """Tells tensors by where they come from; keeps them alive, so that identities are not used twice."""

    def __init__(self, module: nn.Module, arguments: Sequence[torch.Tensor]) -> None:
        self._at: dict[int, tuple[str | int, str | int]] = {}
        self._kept: list[torch.Tensor] = []
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            self.add(tensor, "weight", name)
        for i, tensor in enumerate(arguments):
            self.add(tensor, "argument", i)

    def add(self, tensor: torch.Tensor, source: str | int, index: str | int) -> None:
        self._kept.append(tensor)
        self._at[id(tensor)] = (source, index)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._at

    def of(self, tensor: torch.Tensor) -> Place:
        """A tensor's place.

        Raises:
            Refused: it was neither given to the unit nor made in it.
        """
        found = self._at.get(id(tensor))
        if found is None:
            raise Refused(f"it reads a tensor of form {list(tensor.shape)} that it is not given as an argument")
        return Place(*found, tensor.requires_grad)

    def described(self, value: Any) -> Any:
        """A value of a call, comparable with that of another unit's call.

        Raises:
            Refused: it cannot be compared.
        """
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, (tuple, list)):
            return type(value).__name__, *map(self.described, value)
        if isinstance(value, Mapping):
            return "mapping", *((key, self.described(item)) for key, item in value.items())
        if is_plain(value):
            return type(value), value
        if isinstance(value, (torch.Generator, type)):
            return id(value)
        raise Refused(f"it gives a {type(value).__name__} to a kernel")


class _Watching(TorchDispatchMode):
    """Common to both: the kernels of a unit's forward, with what autograd does around them.

    Attributes:
        refused: the first reason not to trace the unit once; '' if there is none.
        is_looking: this reads tensors itself.
    """

    def __init__(self, module: nn.Module, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.places = _Places(module, arguments)

        self.refused = ""
        self.is_looking = False

    def described(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A kernel's call, comparable with that of another unit.

        Raises:
            Refused: a unit may not call it.
        """
        if func in HOST_READS:
            raise Refused("Python reads a tensor's value in it")
        if has_saved_tensor_hooks():
            raise Refused("hooks on saved tensors are active in it")
        places = self.places
        if any(places.of(tensor).source == "argument" for tensor in written(func, args, kwargs)):
            raise Refused("it writes into an argument")
        return func, torch.is_grad_enabled(), places.described(args), places.described(kwargs)

    def function_described(self, kind: type, args: Any, out: Any) -> Any:
        """A call of a user's autograd.Function: its class, arguments, and what it keeps for its backward."""
        self.is_looking = True
        nodes = [tensor.grad_fn for tensor in pytree.tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        self.is_looking = False
        kept = next((self.places.described(dict(vars(node))) for node in nodes if node is not None), ())
        return kind, self.places.described(args), kept


class Recording(_Watching):
    """While entered, the kernels that are called are recorded in `log`, and run."""

    def __init__(self, module: nn.Module, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__(module, arguments)
        self.log = KernelLog()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = None if self.refused else self._tried(self.described, func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if not self.refused:
            number = len(self.log.calls)
            self.log.calls.append(call)
            self.log.results.append(self._noted(out, number, itertools.count()))
        return out

    def unsafe(self, what: str) -> None:
        """Something was called that touches autograd."""
        self.refused = self.refused or what

    def _tried(self, described: Callable[..., Any], *args: Any) -> Any:
        try:
            return described(*args)
        except Refused as refused:
            self.refused = str(refused)
            return None

    def _noted(self, value: Any, number: int, counter: Iterator[int]) -> Any:
        if isinstance(value, (tuple, list)):
            return like(value, (self._noted(item, number, counter) for item in value))
        if not isinstance(value, torch.Tensor):
            return value
        if value in self.places:
            return self.places.of(value)
        self.places.add(value, number, next(counter))
        return New(Form.of(value), int(value.storage_offset()))

    def function(self, kind: type, args: Any, out: Any) -> None:
        """An autograd.Function was called."""
        if not self.refused:
            self.log.calls.append(self._tried(self.function_described, kind, args, out))
            self.log.results.append(None)


class Comparing(_Watching):
    """While entered, kernels are not run: each must be the next one of a log, and returns a tensor without data.

    Raises:
        Refused: from a kernel's call, where it is another one.
    """

    def __init__(self, module: nn.Module, arguments: Sequence[torch.Tensor], log: KernelLog) -> None:
        super().__init__(module, arguments)
        self._log, self._next = log, 0
        self._made: dict[tuple[Any, Any], torch.Tensor] = {("argument", i): tensor for i, tensor in enumerate(arguments)}
        self._made.update((("weight", name), tensor) for name, tensor in (*module.named_buffers(), *module.named_parameters()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = self._check(self.described, func, args, kwargs or {})
        return self._result(self._log.results[number], number, itertools.count())

    def function(self, kind: type, args: Any, out: Any) -> None:
        """An autograd.Function was called."""
        self._check(self.function_described, kind, args, out)

    def unsafe(self, what: str) -> None:
        """Something was called that touches autograd."""
        self.refused = self.refused or what
        raise Refused(what)

    def finish(self) -> None:
        """Raise Refused where the calls were not those of the log: the unit's code may have caught an error."""
        if self.refused:
            raise Refused(self.refused)
        if self._next != len(self._log.calls):
            raise Refused(f"it calls {self._next} kernels, the template {len(self._log.calls)}")

    def _check(self, described: Callable[..., Any], *args: Any) -> int:
        number = self._next
        try:
            call = described(*args)
            if number >= len(self._log.calls) or self._log.calls[number] != call:
                expected = self._log.calls[number][0] if number < len(self._log.calls) else "nothing"
                how = "with other arguments" if expected is call[0] else f"where the template calls {expected}"
                raise Refused(f"its call {number} is {call[0]} {how}")
        except Refused as refused:
            self.refused = self.refused or str(refused)
            raise
        self._next += 1
        return number

    def _result(self, noted: Any, number: int, counter: Iterator[int]) -> Any:
        if isinstance(noted, (tuple, list)):
            return type(noted)(self._result(item, number, counter) for item in noted)
        if isinstance(noted, Place):
            return self._made[noted.source, noted.index]
        if not isinstance(noted, New):
            return noted
        made = blank(noted.form, noted.offset)
        index = next(counter)
        self._made[number, index] = made
        self.places.add(made, number, index)
        return made


class _Unsafe(TorchFunctionMode):
    def __init__(self, mode: Recording | Comparing) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _UNSAFE and not self._mode.is_looking:
            self._mode.unsafe(f"it calls {_name_of(func)} on a tensor, by which gradients change")
        return func(*args, **(kwargs or {}))


def _name_of(func: Any) -> str:
    owner = getattr(func, "__self__", None)
    return f"Tensor.{getattr(owner, '__name__', '')}" if hasattr(owner, "__get__") else str(func.__qualname__)


@contextlib.contextmanager
def watched(mode: Recording | Comparing) -> Iterator[None]:
    """While entered, `mode` sees kernels and calls of autograd functions; what else touches autograd raises Refused."""
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def applied(kind: Any, *args: Any, **kwargs: Any) -> Any:
        out = apply.__func__(kind, *args, **kwargs)
        mode.function(kind, (args, kwargs), out)
        return out

    function.apply = classmethod(applied)
    try:
        with mode, _Unsafe(mode):
            yield
    finally:
        function.apply = apply


def blanks(arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Leaves without data that look like a unit's arguments."""
    return [blank(Form.of(tensor), int(tensor.storage_offset())).requires_grad_(tensor.requires_grad) for tensor in arguments]


def compared(
    module: nn.Module, log: KernelLog, arguments: Sequence[torch.Tensor], call: Callable[[Sequence[torch.Tensor]], Any]
) -> Any:
    """Whether `call`, the module's forward, calls the kernels of a log; returns its output with tensors by place.

    Python code runs as it would, so that state it changes is changed.

    Raises:
        Refused: it does not.
    """
    given = blanks(arguments)
    mode = Comparing(module, given, log)
    held = held_tensors(module)
    try:
        with watched(mode):
            out = call(given)
    except Exception as error:
        raise Refused(mode.refused or f"compared without data, it raises {type(error).__name__}: {error}") from error
    mode.finish()
    if held != held_tensors(module):
        raise Refused("it replaces a tensor that it holds")
    return pytree.tree_map(lambda leaf: mode.places.of(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)


def held_tensors(module: nn.Module) -> list[tuple[str, str, int]]:
    """Identities of the tensors that a module's parts hold, as weights, buffers and attributes."""
    found = []
    for name, part in module.named_modules():
        for held in (vars(part), vars(part)["_parameters"], vars(part)["_buffers"]):
            found += [(name, key, id(value)) for key, value in held.items() if isinstance(value, torch.Tensor)]
    return found
