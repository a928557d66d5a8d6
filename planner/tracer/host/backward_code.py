"""Code of the model's own that runs in the backward: of hooks on activations, of Functions, of hooks on saved tensors.

Recorded forwards have no backward. What this code may read is found in what it is made of: the names in it, the variables and
modules that it holds, and the functions that these names stand for: of global variables, of classes and Python modules that it
names, of the model's modules, and methods of what it holds. Not followed: what functions return, and what they take.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import _lru_cache_wrapper, cached_property, partial, partialmethod
from typing import Any

import torch
from torch import nn

from planner.tracer.host.foreign import is_called_by_expressions, is_foreign_class, python_module_of
from planner.tracer.host.scopes import each_named, is_library_code
from planner.tracer.host.values import ABSENT, find_in_class, is_object, own_class, own_dict, reachable

_SAVED_TENSORS = id(torch.autograd.graph.saved_tensors_hooks.__init__.__code__)
_APPLY = id(torch.autograd.Function.apply.__func__.__code__)  # type: ignore[attr-defined]
TAKE_CODE = {
    _APPLY: ("cls",),
    id(torch.Tensor.register_hook.__code__): ("hook",),
    id(torch.Tensor.register_post_accumulate_grad_hook.__code__): ("hook",),
    id(torch.autograd.graph.register_multi_grad_hook.__code__): ("fn",),
    _SAVED_TENSORS: ("pack_hook", "unpack_hook"),
}
"""Functions of torch's that are given such code, by identity: names of these arguments."""
_ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))
_ENVIRONS = (os.environ, getattr(os, "environb", None), os.getenv)
"""Names, and what they stand for, by which code reads environment variables."""
_READ_ANY_NAME = frozenset(("getattr", "attrgetter", "vars", "__dict__", "__getattribute__", "eval", "exec"))
"""With these, code reads attributes whose names it need not hold."""
_TABLES = (dict, list, tuple, deque, set, frozenset)
"""Code may call functions that such variables hold."""
_CODE = (
    *(types.FunctionType, types.MethodType, staticmethod, classmethod, property),
    *(cached_property, partial, partialmethod, _lru_cache_wrapper),
)
_LIBRARIES = frozenset(("torch", "numpy", *sys.stdlib_module_names)) - {"__main__"}
_OF_FUNCTIONS = ("backward", "vjp")
"""Methods of a torch.autograd.Function that run in the backward."""
_OF_OPERATORS = ("_backward_fn", "_setup_context_fn")
"""Attributes of a custom operator: what `register_autograd` was given."""
_THAT_STORE = ("forward", "setup_context")
"""Those that give its backward what it holds."""
_OVER_MODULES = frozenset(("children", "modules", "named_children", "named_modules", "_modules"))
"""With these, code may call any submodule."""
_CLOCKS = frozenset(("time", "uuid", "secrets", "datetime"))
"""Python modules of clocks and unique numbers."""


class LeftOut(Enum):
    """What a forward prepares for the backward and no plan repeats: why, and what to do; {0} stands for who does it."""

    NODE_HOOK = (
        "the forward of {0} registers a hook on a node of autograd's graph (grad_fn.register_hook), whose code a plan cannot "
        "know. Register it on the tensor: tensor.register_hook"
    )
    LEAF_HOOK = (
        "the forward of {0} registers a hook on a weight, or on another tensor without history, where it stays: each eager "
        "call adds one more, a planned call none. Register it once, outside of the forward"
    )
    RETAINED_GRADIENT = (
        "the forward of {0} keeps the gradient of an activation (retain_grad), which a plan returns to no one. Return the "
        "activation from the model, and call retain_grad() on it there"
    )
    ENVIRONMENT = (
        "code of {0} that runs in the backward reads environment variables, which a plan cannot compare. Read them in the "
        "forward"
    )
    CLOCK = (
        "code of {0} that runs in the backward reads a clock or makes unique numbers, of which a plan would hold one. Do it "
        "outside of the model"
    )
    ARGUMENTS = (
        "code of {0} that runs in the backward holds a list, dictionary or object of the call's arguments, which a plan cannot "
        "compare there. Read what it needs in the forward"
    )
    SAVED_TENSORS = (
        "the forward of {0} packs or changes what is saved for the backward (torch.autograd.graph.saved_tensors_hooks), which "
        "a plan would leave out: it keeps what it needs itself. Do it around the call of the model, or not at all"
    )


@dataclass(slots=True)
class BackwardCode:
    """Functions that run in the backward: those that torch is given, and those that they call by their names.

    Attributes:
        functions: by identity.
        held: by identity: values of their closures, defaults and global variables, and the objects that they are methods of.
        namespaces: classes and Python modules, not of libraries, that they name, by identity.
        wrappers: decorators of libraries around them, by identity.
        left_out: what no plan repeats of it.
    """

    left_out: set[LeftOut] = field(default_factory=set)
    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)
    namespaces: dict[int, Any] = field(default_factory=dict)
    wrappers: dict[int, Any] = field(default_factory=dict)

    @property
    def codes(self) -> dict[types.CodeType, dict[str, Any]]:
        """Their code, with their global variables."""
        return {code: of.__globals__ for of in self.functions.values() for code in codes_in(of.__code__)}

    @property
    def _co_names(self) -> frozenset[str]:
        return frozenset(name for code in self.codes for name in code.co_names)

    @property
    def names(self) -> frozenset[str] | None:
        """Attributes that they may read: those that they name, in texts, too; None: of any name."""
        return None if self._co_names & _READ_ANY_NAME else self._named

    @property
    def _named(self) -> frozenset[str]:
        own = {name for code in self.codes for name in (code.co_name, *code.co_freevars)}  # functions may be replaced
        return self._co_names.union(own, *(_texts(code.co_consts) for code in self.codes))

    def hold(self, *values: Any) -> None:
        """Note what they hold."""
        self.held |= {id(value): value for value in values}

    def add(self, value: Any) -> None:
        """Add a function, method or callable object, and what it calls, unless it is a library's."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        if isinstance(value, (partial, partialmethod)):
            self.hold(*value.args, *value.keywords.values())
            self.add(value.func)
        elif isinstance(value, _lru_cache_wrapper):
            self.add(value.__wrapped__)
        elif isinstance(value, types.MethodType):
            self.hold(value.__self__)
            self.add(value.__func__)
        elif isinstance(value, types.FunctionType):
            if is_library_code(value.__code__):
                self._add_wrapped(value)
            elif id(value) not in self.functions:
                self._add_function(value)
        elif not isinstance(value, type) and value is not ABSENT and callable(value):
            self.hold(value)
            called = find_in_class(type(value), "__call__")
            if isinstance(called, types.FunctionType):  # Python's own callables have one without end
                self.add(called)

    def _add_wrapped(self, wrapper: types.FunctionType) -> None:
        """Add what a library's decorator (`once_differentiable`, `torch.no_grad()`) was put around."""
        if id(wrapper) in self.wrappers:
            return
        self.wrappers[id(wrapper)] = wrapper
        for value in _cells(wrapper):
            own = own_dict(value) or {}
            of_operator = [own.get(name) for name in _OF_OPERATORS]  # its other functions run as its kernel
            for inner in (value, *of_operator, *(value.values() if isinstance(value, Mapping) else ())):
                self._add_code(inner)

    def _add_special(self, value: Any) -> None:
        """Add the methods by which expressions use an object: `value[0]`, `value + 1`, `len(value)`, `value.made_up`."""
        for kind in type(value).__mro__ if is_object(value) else ():
            for name, method in [] if is_foreign_class(kind) else list(vars(kind).items()):
                if is_called_by_expressions(name):
                    self._add_code(method)

    def _add_function(self, function: types.FunctionType) -> None:
        self.functions[id(function)] = function
        cells = _cells(function)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self.hold(*cells, *defaults)
        codes = list(codes_in(function.__code__))
        named = (scope[name] for code in codes for scope, name in each_named(code, function.__globals__))
        for value in (*named, *cells, *defaults):
            self.add_named(value, str(function.__globals__.get("__name__", "")))

    def add_named(self, value: Any, home: str) -> None:
        """Add what a variable that code of the Python module `home` names leads to."""
        if any(value is environ for environ in _ENVIRONS):
            self.left_out.add(LeftOut.ENVIRONMENT)
        elif isinstance(value, _CODE):
            self.add(value)
        elif _top_package(value) in _CLOCKS:
            self.left_out.add(LeftOut.CLOCK)
        elif isinstance(value, (type, types.ModuleType)):
            if not _is_of_library(value, home):
                self.namespaces[id(value)] = value
        elif own_class(value) is not None or is_object(value):
            self.hold(value)
            self._add_special(value)
            for inner in reachable([value]) if isinstance(value, _TABLES) else ():
                if isinstance(inner, types.FunctionType):
                    self.add(inner)

    def follow(self, model: nn.Module, modules: Collection[int], classes_of_model: Callable[[], Collection[type]]) -> None:
        """Add the code that these functions may call by names: methods of what they hold and of all that this leads to, members
        of the classes and Python modules that they name, functions and submodules that the model's modules have by such names.

        Args:
            modules: identities of the model's modules; from one of them on, everything in the model may be reached.
            classes_of_model: classes of that.
        """
        known = (-1, -1, -1)
        while known != (known := (len(self.functions), len(self.held), len(self.namespaces))):
            classes = self._follow_names(model, modules, classes_of_model)
        if self._named & _ENVIRONMENT:
            self.left_out.add(LeftOut.ENVIRONMENT)
        if self.names is None:  # any method may be called: what it names is compared, and followed no further
            for method in (find_in_class(kind, name) for kind in classes for base in kind.__mro__ for name in vars(base)):
                function = getattr(method, "__func__", getattr(method, "fget", method))
                if isinstance(function, types.FunctionType) and not is_library_code(function.__code__):
                    self.functions[id(function)] = function

    def _follow_names(
        self, model: nn.Module, modules: Collection[int], classes_of_model: Callable[[], Collection[type]]
    ) -> set[type]:
        """Add what is called by the names that are known so far; returns the classes of all that is held."""
        names = self._named
        reached = list(reachable(self.held.values(), modules))
        for value in (*self.held.values(), *_named_in(reached, names)):
            self._add_special(value)
        classes = {type(value) for value in reached}
        if any(id(value) in modules for value in reached):
            classes.update(classes_of_model())
            self._add_of_modules(model, names)
        for kind in classes:
            for name in names | {"__call__"}:
                self._add_code(find_in_class(kind, name))
        for space in list(self.namespaces.values()):
            bases = (*space.__mro__, *inspect.getmro(type(space))) if isinstance(space, type) else ()
            held = {name for base in bases for name in vars(base)} if bases else vars(space).keys()
            home = python_module_of(space) if isinstance(space, type) else space.__name__
            for name in names & held:
                self.add_named(_member_of(space, name), home)
        return classes

    def _add_of_modules(self, model: nn.Module, names: Collection[str]) -> None:
        for module in model.modules():
            own = {**vars(module), **module._modules}
            if not _OVER_MODULES.isdisjoint(names):
                self._add_forwards(module)
            for name in own.keys() & names:
                value = own[name]
                self._add_special(value)
                if isinstance(value, nn.Module):
                    self._add_forwards(value)
                for inner in (value, *reachable([value])) if type(value) in _TABLES else (value,):
                    self._add_code(inner)

    def _add_forwards(self, module: nn.Module) -> None:
        for inner in module.modules():
            self._add_code(find_in_class(type(inner), "forward"))
            self._add_code(find_in_class(type(inner), "__getattr__"))
            self._add_code(vars(inner).get("forward"))

    def _add_code(self, value: Any) -> None:
        if isinstance(value, _CODE):
            self.add(value)
        elif is_object(value):
            get = find_in_class(type(value), "__get__")
            if isinstance(get, types.FunctionType):  # a descriptor
                self.hold(value)
                self.add(get)


def _texts(constant: Any) -> set[str]:
    if isinstance(constant, (tuple, frozenset)):
        return {text for inner in constant for text in _texts(inner)}
    return {constant} if isinstance(constant, str) else set()


def _cells(function: types.FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]


def _named_in(values: Iterable[Any], names: Collection[str]) -> Iterator[Any]:
    """What objects among these hold by such names."""
    for value in values:
        held = (own_dict(value) or {}) if is_object(value) else {}
        yield from (held[name] for name in held.keys() & names)


def _member_of(space: Any, name: str) -> Any:
    """What a class, or its class, or a Python module holds by a name."""
    if not isinstance(space, type):
        return vars(space)[name]
    found = find_in_class(space, name)
    return find_in_class(type(space), name) if found is ABSENT else found


def _top_package(value: Any) -> str:
    """Of a Python module, or of a built-in function or a class."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    is_named = isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type))
    return str(name).partition(".")[0] if is_named else ""


def _is_of_library(value: type | types.ModuleType, home: str) -> bool:
    """Whether a class or Python module belongs to Python, torch, or an installed package that is not the code's own."""
    name = value.__name__ if isinstance(value, types.ModuleType) else python_module_of(value)
    package = name.partition(".")[0]
    if package in _LIBRARIES:
        return True
    file = str(getattr(sys.modules.get(name), "__file__", None))
    return "site-packages" in file and package != home.partition(".")[0]


def given_to(frame: types.FrameType) -> BackwardCode | None:
    """The model's own code that a function of torch's, whose call begins, is given to run in the backward; None: no such."""
    names = TAKE_CODE.get(id(frame.f_code))
    if names is None:
        return None
    found = BackwardCode({LeftOut.SAVED_TENSORS} if id(frame.f_code) == _SAVED_TENSORS else set())
    this = frame.f_locals.get("self")
    if isinstance(this, torch.Tensor) and this.is_leaf and this.requires_grad:
        found.left_out.add(LeftOut.LEAF_HOOK)
    for name in names:
        value = frame.f_locals.get(name)
        if isinstance(value, type):  # of a custom operator torch derives a class, whose forward runs the operator as a kernel
            methods = (*_OF_FUNCTIONS, *(() if is_foreign_class(value) else _THAT_STORE))
            value = [find_in_class(value, method) for method in methods]
        for function in value if isinstance(value, list) else [value]:
            found.add(function)
    if id(frame.f_code) == _APPLY:
        for value in frame.f_locals.get("args", ()):
            found.hold(value)
            found.add_named(value, "")
    return found if found.functions else None


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object, and those of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)
