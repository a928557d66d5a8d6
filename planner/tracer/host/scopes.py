"""What a forward may read of Python's state: the code that ran, the global variables it names, and attributes by class."""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib.util
import itertools
import sys
import sysconfig
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from planner.tracer.host.foreign import is_foreign_namespace, is_special

PACKAGE = str(Path(__file__).parents[2])
_STDLIB = sysconfig.get_paths()["stdlib"]
_TORCH = str(Path(torch.__file__).parent)
_LAYERS = str(Path(torch.__file__).parent / "nn")
_MODULE = str(Path(torch.nn.modules.module.__file__))


@dataclass(frozen=True, eq=False)
class Scope:
    """Global variables of one Python module (or of code made by exec) that a forward reads.

    Attributes:
        module: the Python module's name; "" where the code belongs to none.
        variables: the dictionary that holds them; not pickled.
        names: of those that are read.
        where: qualified name of the submodule that was running when one was first read.
        kind: what messages call them.
    """

    module: str
    variables: dict[str, Any] = field(repr=False)
    names: frozenset[str]
    where: str = ""
    kind: ClassVar[str] = "the global variable"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scope) and self.variables is other.variables

    def __hash__(self) -> int:
        return id(self.variables)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_scope, (self.module, self.names, self.where)


def _restored_scope(module: str, names: frozenset[str], where: str) -> Scope:
    return Scope(module, vars(sys.modules[module]) if module in sys.modules else {}, names, where)


class ArgumentsScope(threading.local):
    """The scope of paths that start from a call's arguments: those of the call that is bound in this thread.

    Attributes:
        variables: "args" and "kwargs" of that call.
    """

    kind = "the argument"
    module = where = ""
    names = frozenset(("args", "kwargs"))

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {}

    def __reduce__(self) -> str:
        return "ARGUMENTS"


ARGUMENTS = ArgumentsScope()
"""There is one, from which paths of all models start."""


@dataclass(frozen=True)
class Reads:
    """What a forward reads of Python's state.

    Attributes:
        attributes: per class, the attributes of its instances.
        names: every attribute name in the code that ran.
        scopes: global variables.
        environment: environment variables.
        opaque_scopes: global variables that opaque modules may use. They steer no plan; whoever runs a forward on the side puts
            them back.
        backward_names: attributes that code of the backward may read, of any object; None: of any name.
    """

    attributes: Mapping[type, frozenset[str]]
    names: frozenset[str]
    scopes: tuple[Scope, ...] = ()
    environment: tuple[str, ...] = ()
    opaque_scopes: tuple[Scope, ...] = ()
    backward_names: frozenset[str] | None = frozenset()

    def wants(self, value: Any, name: str) -> bool:
        """An attribute of an object counts; those of modules that code of the backward may read are among `attributes`."""
        if self.backward_names is None and not isinstance(value, torch.nn.Module):
            return True
        return name in self.attributes.get(type(value), self.names) or name in (self.backward_names or ())


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Global variables that the code itself names."""
    kinds = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")
    return frozenset(str(ins.argval) for ins in dis.get_instructions(code) if ins.opname in kinds)


@functools.lru_cache(maxsize=4096)
def compares_identities(code: types.CodeType) -> bool:
    """The code asks whether two objects are the same one (`key is value`).

    Comparisons with constants, global and closure variables do not count.

    Of torch's own code, that of its layers and their functions is looked at (nn.MultiheadAttention asks).
    """
    if code.co_filename == _MODULE or (is_library_code(code) and not code.co_filename.startswith(_LAYERS)):
        return False
    steps = list(dis.get_instructions(code))
    return any(
        step.opname == "IS_OP" and not before.opname.startswith(("LOAD_CONST", "LOAD_GLOBAL", "LOAD_DEREF"))
        for before, step in itertools.pairwise(steps)
    )


def is_library_code(code: types.CodeType) -> bool:
    """Code of torch, of Python's own library or of this package: its global variables steer no model."""
    file = code.co_filename
    if file.startswith((_TORCH, PACKAGE, "<frozen")):
        return True
    return file.startswith(_STDLIB) and "site-packages" not in file


_LOOKS_UP = frozenset(
    ("getattr", "hasattr", "setattr", "vars", "attrgetter", "methodcaller", "__dict__", "__getattribute__", "eval")
)
"""Code that names one of these may look attributes up by texts."""
_FINDS_MODULES = frozenset(("import_module", "__import__", "getmodule", "globals", "f_globals", "__globals__"))
"""Code that names one of these, or `sys.modules`, may find Python modules, and its own, by texts, too."""


@functools.lru_cache(maxsize=4096)
def _texts(code: types.CodeType) -> frozenset[str]:
    """The texts among the constants of code that may name something, and the parts of dotted ones."""
    found, todo = set[str](), [*code.co_consts]
    while todo:
        constant = todo.pop()
        if isinstance(constant, (tuple, frozenset)):
            todo += constant
        elif isinstance(constant, str) and all(part.isidentifier() for part in constant.split(".")):
            found.update((constant, *constant.split(".")))
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _finds_modules(code: types.CodeType) -> bool:
    names = {*code.co_names}
    return not _FINDS_MODULES.isdisjoint(names) or ("modules" in names and ("sys" in names or "modules" in global_names(code)))


class Texts(NamedTuple):
    """Constant texts by which code may look something up.

    Attributes:
        attributes: by which it may find attributes.
        modules: by which it may find Python modules, in `sys.modules`.
    """

    attributes: frozenset[str]
    modules: frozenset[str]


def texts_of(codes: Iterable[types.CodeType]) -> Texts:
    """The texts of all this code, where any of it looks up by texts: one function may look up what another one names."""
    codes, none = list(codes), frozenset[str]()
    texts = none.union(*map(_texts, codes))
    finds = any(map(_finds_modules, codes))
    looks_up = finds or any(not _LOOKS_UP.isdisjoint(code.co_names) for code in codes)
    return Texts(texts if looks_up else none, texts if finds else none)


def attribute_names(codes: Iterable[types.CodeType]) -> frozenset[str]:
    """The attributes that code may read: those it names and, where some of it looks attributes up by texts, its texts."""
    codes = list(codes)
    return texts_of(codes).attributes.union(*(code.co_names for code in codes))


@functools.lru_cache(maxsize=4096)
def _imports(code: types.CodeType) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """(level, module, names) of each import statement in the code."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]  # before numbers above 255
    at = [i for i, step in enumerate(steps) if step.opname == "IMPORT_NAME"]
    return tuple((steps[i - 2].argval, str(steps[i].argval), tuple(steps[i - 1].argval or ())) for i in at)


def imported_modules(code: types.CodeType, variables: Mapping[str, Any], texts: Texts) -> list[types.ModuleType]:
    """Python modules that code with these global variables imports, or may find by these texts."""
    names: list[str] = []
    package = str(variables.get("__package__") or variables.get("__name__", "").rpartition(".")[0])
    for level, name, wanted in _imports(code):
        with contextlib.suppress(ImportError):
            full = importlib.util.resolve_name("." * level + name, package)
            parts = full.split(".")
            names += [*(".".join(parts[: i + 1]) for i in range(len(parts))), *(f"{full}.{inner}" for inner in wanted)]
    found = (sys.modules.get(name) for name in (*names, *sorted(texts.modules)))
    return [module for module in found if isinstance(module, types.ModuleType)]


def named_variables(
    code: types.CodeType, variables: dict[str, Any], texts: Texts
) -> list[tuple[dict[str, Any], frozenset[str]]]:
    """What code may read by names: (the variables of a Python module, its names), of its own first, then of modules of the
    user's that it names as a variable or an attribute, imports, or finds by a text. Of its own there need not be all.

    Args:
        code: that ran.
        variables: its own global variables.
        texts: by which it may look something up.
    """
    names = texts.attributes.union(code.co_names)
    own = global_names(code) | (names & variables.keys() | _texts(code) if _finds_modules(code) else frozenset())
    found = {id(variables): (variables, own)}
    todo = [*imported_modules(code, variables, texts), *(variables.get(name) for name in global_names(code))]
    seen = set[int]()
    while todo:
        module = todo.pop()
        if isinstance(module, types.ModuleType) and not is_foreign_namespace(module) and id(module) not in seen:
            seen.add(id(module))
            held = vars(module)
            mine = frozenset(name for name in names & held.keys() if not is_special(name))
            found[id(held)] = (held, found.get(id(held), (held, frozenset()))[1] | mine)
            todo += [held[name] for name in mine]
    return list(found.values())


def each_named(code: types.CodeType, variables: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(the variables of a Python module, a name in them) of all that `named_variables` finds and that is there."""
    yield from (
        (scope, name) for scope, names in named_variables(code, variables, texts_of([code])) for name in names & scope.keys()
    )


def scopes_of(codes: Mapping[types.CodeType, tuple[dict[str, Any], str]]) -> tuple[Scope, ...]:
    """The global variables that code names, by the Python module that holds them."""
    found: dict[int, Scope] = {}
    texts = texts_of(codes)
    for code, (own, where) in codes.items():
        if str(own.get("__name__", "")).startswith("namedtuple_"):
            continue  # collections.namedtuple makes these, for one class each
        for variables, names in named_variables(code, own, texts):
            known = found.get(id(variables))
            name = str(variables.get("__name__", ""))
            home = name if vars(sys.modules.get(name, types)).get("__name__") == name else ""
            home = home if home and vars(sys.modules[home]) is variables else ""
            names |= known.names if known else frozenset()
            found[id(variables)] = Scope(home, variables, names, known.where if known else where)
    return tuple(found.values())
