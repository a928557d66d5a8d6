"""What a forward may read of Python's state: the code that ran, the global variables it names, and attributes by class."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import sysconfig
import threading
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

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


def scopes_of(codes: Mapping[types.CodeType, tuple[dict[str, Any], str]]) -> tuple[Scope, ...]:
    """The global variables that code names, by the Python module that holds them."""
    found: dict[int, Scope] = {}
    for code, (variables, where) in codes.items():
        if str(variables.get("__name__", "")).startswith("namedtuple_"):
            continue  # collections.namedtuple makes these, for one class each
        known = found.get(id(variables))
        names = global_names(code) & variables.keys() | (known.names if known else frozenset())
        name = str(variables.get("__name__", ""))
        home = name if vars(sys.modules.get(name, types)).get("__name__") == name else ""
        home = home if home and vars(sys.modules[home]) is variables else ""
        found[id(variables)] = Scope(home, variables, names, known.where if known else where)
    return tuple(found.values())
