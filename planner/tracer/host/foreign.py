"""Whose a class, a Python module or a name is: the user's, or Python's, torch's and other packages'."""

from __future__ import annotations

import sys
import types
from collections import UserDict, UserList
from typing import Any

import torch
from torch import nn

_FOREIGN = (
    "random",
    "torch",
    "numpy",
    "builtins",
    "collections",
    "functools",
    "logging",
    "threading",
    "re",
    "enum",
    "abc",
    "typing",
    "planner",
)
"""Packages whose objects are leaves."""


_HOLD_SETTINGS = (
    UserDict,
    UserList,
    torch.amp.GradScaler,
    torch.distributions.Distribution,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)
"""Classes of these packages whose objects are compared by their attributes."""


_OF_PYTHON: tuple[Any, ...] = (nn.Module, torch.Tensor, type, len, lambda: 0, types.ModuleType(""), {}, [], set(), "", 0j)
_SPECIAL = frozenset(name for value in _OF_PYTHON for name in dir(value) if name[:2] == "__") | {
    *("__abstractmethods__", "__all__", "__builtins__", "__cached__", "__constants__", "__file__", "__jit_unused_properties__"),
    *("__match_args__", "__path__", "__slots__", "__static_attributes__", "__firstlineno__"),
}
"""Names with two underscores of Python's and torch's own classes, and those that Python itself writes."""
_GENERATED = ("__annot", "__attrs_", "__class", "__dataclass_", "__orig_", "__param", "__pydantic_", "__warningreg")
"""How further names begin that decorators, base classes and Python itself write."""


def is_special(name: str) -> bool:
    """A name that Python, torch or a decorator gives a meaning: no state of the user's, unlike others with two underscores."""
    return name[:2] == "__" and (name in _SPECIAL or name.startswith(_GENERATED))


def python_module_of(kind: type) -> str:
    """The Python module that a class is from, past a metaclass of the user's; "" for one made where there is none (`exec`)."""
    try:
        return str(type.__getattribute__(kind, "__module__"))
    except AttributeError:
        return ""


def package_of(kind: type) -> str:
    """The top package of the Python module that a class is from."""
    return python_module_of(kind).partition(".")[0]


def is_foreign_class(kind: type) -> bool:
    """Objects of this class are compared as a whole: torch's, numpy's, Python's own, but for those that hold settings."""
    return package_of(kind) in _FOREIGN and not issubclass(kind, _HOLD_SETTINGS)


def is_foreign_namespace(value: type | types.ModuleType) -> bool:
    """A class or a Python module of torch, numpy, this package or Python's own library."""
    name = python_module_of(value) if isinstance(value, type) else str(vars(value).get("__name__", ""))
    package = name.partition(".")[0]  # looked up past a `__getattr__` of the user's
    return package in _FOREIGN or (package in sys.stdlib_module_names and package != "__main__")


_NOT_CALLED = frozenset(
    f"__{name}__"
    for name in (
        *("init", "new", "del", "init_subclass", "class_getitem", "subclasshook", "repr", "reduce", "reduce_ex", "getstate"),
        *("setstate", "deepcopy", "copy", "setattr", "sizeof", "dir", "module", "dict", "weakref", "doc", "annotations"),
    )
)
"""Of an object's special methods, those that no expression calls."""


def is_called_by_expressions(name: str) -> bool:
    """A special method that expressions call without naming it: `value(x)`, `value[0]`, `len(value)`, `value + 1`."""
    return name[:2] == name[-2:] == "__" and name not in _NOT_CALLED
