"""What a forward reads of libraries: their variables and functions (`torch.backends.cudnn.benchmark`), and what these return.

Code names them by a global variable and attributes, which is read off the code that ran, or imports them where it runs: then
all of the module's names that it mentions count. A call counts if its arguments are constants and its name says that it only
asks (`torch.get_num_threads()`). What code reads by other ways (a local alias of a function, a file) is not seen.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.errors import CaptureError
from planner.tracer.host.fingerprint import Fingerprint, alike, everything
from planner.tracer.host.foreign import is_foreign_class
from planner.tracer.host.scopes import imported_modules, texts_of
from planner.tracer.host.values import ABSENT

_ASKS = re.compile(r"_?(get|is|are|has)(_|[a-z]+$)|\w*_(enabled|available|allowed|initialized)$")
"""Names of functions that return a state and change none."""
_ASKED = ("torch", "numpy", "os", "sys", "threading", "platform", "locale", "warnings", "logging")
"""Packages whose functions are called for an answer. Planning calls them even where the code that ran did not come by them."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)


@dataclass(frozen=True, slots=True)
class LibraryRead:
    """A variable or function of a library, or what a function returns.

    Attributes:
        module: name of the Python module that the path starts from.
        path: attributes from there.
        arguments: of a call; None: it is not called.
        expected: fingerprint of what was read.
        where: the submodule that was running.
    """

    module: str
    path: tuple[str, ...]
    arguments: tuple[Any, ...] | None
    expected: Fingerprint
    where: str = ""

    def __str__(self) -> str:
        call = "" if self.arguments is None else f"({', '.join(map(repr, self.arguments))})"
        return ".".join((self.module, *self.path)) + call

    def value(self) -> Any:
        """What is there now; ABSENT where there is nothing."""
        found: Any = sys.modules.get(self.module, ABSENT)
        for name in self.path:
            found = getattr(found, name, ABSENT)
        return found if self.arguments is None or found is ABSENT else found(*self.arguments)

    def now(self) -> Fingerprint:
        """The fingerprint of `value`."""
        return everything().of(self.value())


def library_reads(codes: Mapping[types.CodeType, tuple[dict[str, Any], str]]) -> tuple[LibraryRead, ...]:
    """What code reads of libraries.

    Args:
        codes: the user's code that ran, each with its global variables.
    """
    found: dict[Any, LibraryRead] = {}
    texts = texts_of(codes)
    for code, (variables, where) in codes.items():
        for module in imported_modules(code, variables, texts):
            if (root := _root(module)) is not None:
                for name in vars(module).keys() & set(code.co_names):
                    found.setdefault((root[0], (name,), None), LibraryRead(root[0], (name,), None, None, where))
        for name, attributes, arguments in _chains(code):
            root = _root(variables.get(name))
            if root is None:
                continue
            home, path = root[0], (*root[1], *attributes)
            called = arguments is not None and _may_be_called(home, path)
            key = (home, path, arguments if called else None)
            if attributes or called:
                with contextlib.suppress(TypeError):  # an argument that cannot be a key
                    found.setdefault(key, LibraryRead(*key, None, where))
    return tuple(_read(found.values()))


def _may_be_called(module: str, path: Sequence[str]) -> bool:
    """The function only answers. What would initialize a device does more."""
    if not path or not _ASKS.match(path[-1]) or module.partition(".")[0] not in _ASKED:
        return False
    return torch.cuda.is_initialized() or not ".".join((module, *path)).startswith("torch.cuda.get_")


def check_traced(reads: Iterable[LibraryRead]) -> None:
    """Raise CaptureError, while a forward is traced, where libraries hold or return something else than in a real forward."""
    for read in reads:
        if not alike(read.expected, read.now()):
            raise CaptureError(
                f"the forward of {read.where or 'the model'} reads {read}, which is another one while the forward is traced",
                module=read.where,
            )


def _read(candidates: Iterable[LibraryRead]) -> Iterator[LibraryRead]:
    for one in candidates:
        try:
            value = one.value()
            if not _is_compared(value):
                continue
            read = replace(one, expected=one.now())
            if alike(read.expected, read.now()):  # else a clock, or a counter
                yield read
        except Exception:  # the library's own: code that ran did not come here
            continue


def _is_compared(value: Any) -> bool:
    if value is ABSENT or type(value) in _PLAIN or isinstance(value, _FUNCTIONS):
        owner = getattr(value, "__self__", None)
        return owner is None or isinstance(owner, types.ModuleType)
    return type(value) in (list, tuple) and all(type(item) in _PLAIN for item in value)


def _root(value: Any) -> tuple[str, tuple[str, ...]] | None:
    """The module, and the path in it, of a library's module, class or function; None for anything else."""
    if isinstance(value, types.ModuleType):
        package = value.__name__.partition(".")[0]
        is_library = package in ("torch", "numpy") or (package in sys.stdlib_module_names and package != "__main__")
        return (value.__name__, ()) if is_library and sys.modules.get(value.__name__) is value else None
    if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return None
    if isinstance(value, type) and not is_foreign_class(value):
        return None
    module = str(getattr(value, "__module__", None) or "")
    package = module.partition(".")[0]
    if package not in ("torch", "numpy") and package not in sys.stdlib_module_names:
        return None
    path = tuple(value.__qualname__.split("."))
    found: Any = sys.modules.get(module)
    for name in path:
        found = getattr(found, name, None)
    return (module, path) if found is value and module != "builtins" else None


_NO_VALUES = ("PUSH_NULL", "PRECALL", "CACHE", "EXTENDED_ARG")


@functools.lru_cache(maxsize=4096)
def _chains(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...], tuple[Any, ...] | None], ...]:
    """(global variable, attributes, constant arguments of a call or None) of each place where code reads such a path."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_VALUES]
    found = []
    for i, step in enumerate(steps):
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        attributes, arguments, end = list[str](), list[Any](), i + 1
        while end < len(steps) and steps[end].opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append(str(steps[end].argval))
            end += 1
        while end < len(steps) and steps[end].opname == "LOAD_CONST":
            arguments.append(steps[end].argval)
            end += 1
        is_call = end < len(steps) and steps[end].opname == "CALL" and steps[end].arg == len(arguments)
        if i > 0 and steps[i - 1].argval in ("getattr", "hasattr") and arguments and isinstance(arguments[0], str):
            attributes, is_call = [*attributes, arguments[0]], False
        found.append((str(step.argval), tuple(attributes), tuple(arguments) if is_call else None))
    return tuple(found)


def reader(reads: tuple[LibraryRead, ...]) -> Callable[[], tuple[Any, ...]]:
    """A function that returns every value, for a comparison by identity. Generated code: a loop takes several times as long."""
    given = {f"m{i}": sys.modules[module] for i, module in enumerate(dict.fromkeys(read.module for read in reads))}
    names = {module.__name__: name for name, module in given.items()}
    looked_up = "".join(f"{'.'.join((names[read.module], *read.path))}, " for read in reads)
    made: dict[str, Any] = {}
    exec(f"def bind({', '.join(given)}):\n    def read():\n        return ({looked_up})\n    return read", made)
    return made["bind"](*given.values())  # type: ignore[no-any-return]
