"""The house's floors, read from the imports: a file imports lower floors only, and private torch names have their homes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "planner").rglob("*.py"))

FLOORS: dict[str, float] = {
    "planner.arguments": 0.5,
    "planner.errors": 0,
    "planner.limits": 0,
    "planner.log": 0,
    "planner.units": 0,
    "planner.graph": 1,
    "planner.solver": 2,
    "planner._compat.internals": 2,
    "planner._compat.inductor": 2,
    "planner._compat.collectives": 2,
    "planner._compat.kernels": 2,
    "planner._compat.switches": 2,
    "planner.tracer": 2,
    "planner.profiler": 2,
    "planner.rewriter": 2,
    "planner.runtime": 2.5,
    "planner.export": 2.7,
    "planner.report": 3,
    "planner.results": 3,
    "planner.analysis": 3.5,
    "planner.api": 4,
    "planner.batch": 4,
    "planner.children": 4,
    "planner.levels": 4,
    "planner.priced": 4,
    "planner.cli": 5,
    "planner.command_line": 5,
    "planner.compile_backend": 5,
}
HOMES = (
    "planner._compat.internals",
    "planner._compat.inductor",
    "planner._compat.switches",
    "planner._compat.collectives",
    "planner._compat.kernels",
)
TORCH_SIDE = (*HOMES, "planner.tracer", "planner.profiler", "planner.rewriter", "planner.runtime", "planner.export")
ALLOWED: dict[str, frozenset[str]] = {
    "planner.errors": frozenset(),
    "planner.limits": frozenset(),
    "planner.log": frozenset(),
    "planner.units": frozenset(),
    "planner.graph": frozenset({"numpy"}),
    "planner.solver": frozenset({"pulp", "networkx", "numpy"}),
}
"""What the rooms without torch may import beside the standard library and this package."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports: modules, and names taken from modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The entry of FLOORS that a dotted name lies in."""
    return next((key for key in FLOORS if name == key or name.startswith(key + ".")), None)


def breaches(name: str, tree: ast.AST) -> list[str]:
    """The imports of a module that its floor does not allow."""
    own = room(name)
    found = []
    for imported in imports(tree):
        other = room(imported)
        top = imported.split(".")[0]
        if own in ALLOWED and top != "planner" and top not in sys.stdlib_module_names | ALLOWED[own]:
            found.append(f"{name} imports {imported}: this room never sees {top}")
        if imported == "planner" and name != "planner":
            found.append(f"{name} imports the public face")
        if own is None or other is None or own == other:
            continue
        if FLOORS[other] > FLOORS[own]:
            found.append(f"{name} (floor {FLOORS[own]}) imports {imported} (floor {FLOORS[other]})")
        if {own, other} & {"planner.solver"} and {own, other} & set(TORCH_SIDE):
            found.append(f"{name} imports {imported}: solver and torch side meet in api.py only")
    return found


def private_torch_names(tree: ast.AST) -> list[str]:
    """Dotted torch names with a private part (`torch._x`, `torch.x._y`), imported or written out.

    Dunders are public, and so is every operator's name below `torch.ops`.
    """

    def private(dotted: str) -> bool:
        parts = dotted.split(".")
        return (
            parts[0] == "torch"
            and parts[1:2] != ["ops"]
            and any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
        )

    written = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted({name for name in (*imports(tree), *written) if private(name)})


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_a_file_imports_lower_floors_only(path: Path) -> None:
    assert breaches(module_name(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_private_torch_names_are_at_home(path: Path) -> None:
    if module_name(path) not in HOMES:
        assert private_torch_names(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_every_room_has_a_floor() -> None:
    tops = {".".join(module_name(path).split(".")[:2]) for path in FILES} - {"planner"}
    assert tops <= FLOORS.keys()


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("planner.graph.graph", "from planner.solver.solve import solve", "floor 1"),
        ("planner.solver.solve", "import torch", "never sees torch"),
        ("planner.solver.solve", "def f():\n    from torch.fx import Node", "never sees torch"),
        ("planner.results.plan", "import networkx as nx", "never sees networkx"),
        ("planner.tracer.lower", "from planner.solver import solve", "meet in api.py only"),
        ("planner.solver.solve", "from planner.tracer import lower", "meet in api.py only"),
        ("planner.runtime.module", "from planner.api import plan", "floor 4"),
        ("planner.report.table", "import planner.cli", "floor 5"),
        ("planner.report.table", "import planner", "public face"),
    ],
)
def test_a_breach_is_seen(name: str, source: str, complaint: str) -> None:
    assert any(complaint in breach for breach in breaches(name, ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.fx.graph import _PyTreeCodeGen", ["torch.fx.graph._PyTreeCodeGen"]),
        ("from torch._subclasses import FakeTensor", ["torch._subclasses.FakeTensor"]),
        ("x = torch.fx._lazy", ["torch.fx._lazy"]),
        ("x = torch.ops.aten._softmax.default", []),
        ("from torch.fx import Node\nv = torch.__version__\nw = other._name", []),
    ],
)
def test_private_names_are_seen(source: str, seen: list[str]) -> None:
    assert private_torch_names(ast.parse(source)) == seen
