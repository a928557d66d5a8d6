"""What keeps the trace equal to eager: host reads recorded and replayed, the user's lines, a model left as it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CellType, FrameType, FunctionType
from typing import Any

import torch
import torch.fx.traceback
from torch import nn

from planner._torch import DataDependentOutputException, TorchDispatchMode
from planner.errors import CaptureError
from planner.tracer.casts import Casts
from planner.tracer.constants import Constants

# Kernels that hand a tensor's value to Python.
HOST_READS = frozenset({torch.ops.aten._local_scalar_dense.default})

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps its hooks."""
_CONTAINERS = (dict, list, set, OrderedDict)
_OWN_HOOKS = ("torch.nn.utils", "transformers.")

_PACKAGE = str(Path(__file__).parent.parent)
_CALLER = str(Path(__file__).with_name("capture.py"))  # who calls the model: frames beyond are not the model's
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTIONS = str(Path(torch.__file__).parent / "distributions")
VALIDATIONS: set[str] = set()
"""Lines that ran code of torch.distributions, whose argument checks read tensor values: for errors."""
_STDLIB = str(Path(functools.__file__).parent)


class ModuleStack:
    """The qualified name of the submodule whose forward is running, kept by hooks on the model's modules.

    Attributes:
        drew: the innermost submodule that drew from Python's random module; "" if none did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._states: list[Any] = []
        self.drew = ""

    def __str__(self) -> str:
        return self._running[-1] if self._running else ""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """While entered, forwards of the model's submodules are followed."""

        def enter(module: nn.Module, _args: Any) -> None:
            if module in self._names:
                self._running.append(self._names[module])
                self._states.append(random.getstate())

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if module in self._names and self._running:
                name, state = self._running.pop(), self._states.pop()
                if not self.drew and random.getstate() != state:
                    self.drew = name

        hooks = nn.modules.module
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()
            self._states.clear()


def is_foreign(hook: Any) -> bool:
    """The hook is the user's. Those by which libraries compute (weight_norm, spectral_norm, recorded outputs) are traced."""
    return not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS)


def user_line() -> str:
    """'file.py:12' of the innermost running frame of the model's own code; where only torch's runs, '(BatchNorm2d)'.

    Frames of torch, of the standard library and of this package are no place that a user can go to.
    """
    frame: FrameType | None = sys._getframe(1)
    inside_torch, is_validation = "", False
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file = frame.f_code.co_filename
        if is_users(file):
            line = f"{Path(file).name}:{frame.f_lineno}"
            if is_validation:
                VALIDATIONS.add(line)
            return line
        is_validation = is_validation or file.startswith(_DISTRIBUTIONS)
        module = frame.f_locals.get("self") if frame.f_code.co_name == "forward" and not inside_torch else None
        if isinstance(module, nn.Module) and file.startswith(_TORCH):
            inside_torch = f"({type(module).__name__})"
        frame = frame.f_back
    return inside_torch


def is_users(file: str) -> bool:
    """A source file of the user's, or of a library other than torch, the standard library and this package."""
    if file.startswith((_TORCH, _PACKAGE, "<")):
        return file.startswith("<ipython")
    return not file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file


class Tracing(TorchDispatchMode):
    """Inside the traced forward: notes where each kernel was called and answers host reads from a recording.

    Attributes:
        read: (tensor read, value, source) per host read, in order; the tensors are traced.
        where: source of the kernel called last, for errors.
    """

    def __init__(
        self,
        modules: ModuleStack,
        recorded: Sequence[tuple[str, Any]] | None,
        casts: Casts,
        constants: Constants | None = None,
    ) -> None:
        """`constants`: collects them, and answers reads of them; without it, only the recording does."""
        super().__init__()
        self._constants = constants
        self._casts = casts
        self._modules = modules
        self._recorded = recorded
        self.read: list[tuple[torch.Tensor, Any, str]] = []
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.where = f"{self._modules} {user_line()}".strip()
        if func in HOST_READS:
            return self._answer(func, args)
        with torch.fx.traceback.annotate({"planner_source": self.where, **self._casts.mark(func, args, kwargs)}):
            out = func(*args, **(kwargs or {}))
        if self._constants is not None:
            self._constants.note(func, args, kwargs or {}, out)
        return out

    def _answer(self, func: Any, args: Any) -> Any:
        constant = None if self._constants is None else self._constants.value(args[0])
        if constant is not None:
            return constant
        if self._recorded is None:
            raise DataDependentOutputException(func)
        position = len(self.read)
        if position >= len(self._recorded) or self._recorded[position][0] != str(func):
            raise CaptureError(
                f"the model read other tensor values while traced than in a real forward ({func} at {self.where}); "
                "its control flow depends on something a trace cannot hold",
                module=str(self._modules),
            )
        value = self._recorded[position][1]
        self.read.append((args[0], value, self.where))
        return value


@dataclass(frozen=True, slots=True)
class Change:
    """Something that a forward left otherwise than it found it: an attribute of a module, or Python's random state.

    Attributes:
        module: position of the module in `modules()`; -1 for Python's random state.
        name: the attribute's name.
        before, after: its values.
    """

    module: int
    name: str
    before: Any = None
    after: Any = None

    @property
    def steers(self) -> bool:
        """Later calls may take another way because of it: a number, a word, or a random draw."""
        plain = isinstance(self.before, (int, float, str)) and isinstance(self.after, (int, float, str))
        return self.module < 0 or (plain and self.before != self.after)


@contextlib.contextmanager
def untouched(model: nn.Module, tensors: Sequence[torch.Tensor] = ()) -> Iterator[None]:
    """Put back what running or tracing the model changes: attributes, RNG states and the contents of `tensors`."""
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        try:
            with restored(model):
                yield
        finally:
            with torch.no_grad():
                for tensor, content in contents:
                    tensor.copy_(content)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[list[Change]]:
    """Put back Python's side: modules' attributes, what their containers hold, Python's random state.

    Function caches of the modules' classes are emptied, before and after: what a trace leaves in them are no real tensors.
    Yields a list that holds, afterwards, what was changed.
    """
    caches = _caches(model)
    for cache in caches:
        cache.cache_clear()
    changes: list[Change] = []
    python_state = random.getstate()
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    containers = [(c, copy.copy(c)) for held in before for c in held.values() if type(c) in _CONTAINERS]
    try:
        yield changes
    finally:
        if random.getstate() != python_state:
            random.setstate(python_state)
            changes.append(Change(-1, "random"))
        for i, (module, held) in enumerate(zip(modules, before, strict=True)):
            now = vars(module)
            changes += [Change(i, k, old, now.get(k)) for k, old in held.items() if now.get(k, changes) is not old]
            now.clear()
            now.update(held)
        for container, content in containers:
            _refill(container, content)
        for cache in caches:
            cache.cache_clear()


def _caches(model: nn.Module) -> list[Any]:
    """The functools caches among, or right behind, the functions of the modules' classes."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    functions = [getattr(member, "__func__", member) for kind in kinds for member in vars(kind).values()]
    cells = [cell for f in functions if isinstance(f, FunctionType) for cell in f.__closure__ or ()]
    behind = [cell.cell_contents for cell in cells if not _is_empty(cell)]
    return [found for found in (*functions, *behind) if isinstance(found, functools._lru_cache_wrapper)]


def _is_empty(cell: CellType) -> bool:
    return cell == CellType()


def _refill(live: Any, old: Any) -> None:
    live.clear()
    live.extend(old) if isinstance(live, list) else live.update(old)
