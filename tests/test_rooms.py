"""The order of the rooms, read from every import: a file imports lower rooms only, and private torch names have their home."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import networkx
import pytest

from tests.support.imports import imports, module_name
from tests.support.paths import ROOT

FILES = sorted((ROOT / "planner").rglob("*.py"))

ROOMS = (
    "errors",
    "limits",
    "log",
    "units",
    "arguments",
    "graph",
    "solver",
    "analysis",
    "report",
    "results",
    "kernels",
    "_compat",
    "profiler",
    "tracer",
    "rewriter",
    "runtime",
    "export",
    "verification",
    "options",
    "captured",
    "other_states",
    "diagnosis",
    "profiled",
    "composite",
    "estimated",
    "api",
    "batch",
    "children",
    "integrations",
    "cli",
    "__main__",
)
"""From the bottom up: a file imports files of its own room, and of rooms before it."""
TORCH_SIDE = ("kernels", "_compat", "profiler", "tracer", "rewriter", "runtime", "export", "verification")
_PLAIN = frozenset({"numpy"})
THIRD_PARTY: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "limits": frozenset(),
    "log": frozenset(),
    "units": frozenset(),
    "graph": _PLAIN,
    "solver": _PLAIN | {"pulp", "highspy"},
    "analysis": _PLAIN,
    "report": _PLAIN | {"rich", "matplotlib", "PIL", "plotly"},
    "results": _PLAIN | {"rich"},
}
"""What the rooms without torch may import beside the standard library and this package."""


def room(name: str) -> str | None:
    """The room that a dotted name lies in."""
    top, _, rest = name.partition(".")
    here = rest.partition(".")[0]
    return here if top == "planner" and here in ROOMS else None


def breaches(name: str, tree: ast.AST) -> list[str]:
    """The imports of a module that its room does not allow."""
    own = room(name)
    found = []
    for imported in imports(tree):
        other = room(imported)
        top = imported.split(".")[0]
        if imported.startswith("<") and name != "planner":
            found.append(f"{name} builds the name of what it imports: {imported}")
        if own in THIRD_PARTY and top != "planner" and top not in sys.stdlib_module_names | THIRD_PARTY[own]:
            found.append(f"{name} imports {imported}: this room never sees {top}")
        if imported == "planner" and name != "planner":
            found.append(f"{name} imports the public face")
        if own is None or other is None or own == other:
            continue
        if ROOMS.index(other) > ROOMS.index(own):
            found.append(f"{name} imports {imported}, of the room {other} above it")
        if {own, other} & {"solver"} and {own, other} & set(TORCH_SIDE):
            found.append(f"{name} imports {imported}: solver and torch side meet above both only")
    return found


def cycles(trees: Mapping[str, ast.AST]) -> list[set[str]]:
    """Files that import each other, over however many others."""
    graph = networkx.DiGraph()
    for name, tree in trees.items():
        for imported in imports(tree):
            target = imported if imported in trees else imported.rpartition(".")[0]
            if target in trees and target not in (name, "planner"):
                graph.add_edge(name, target)
    return [found for found in networkx.strongly_connected_components(graph) if len(found) > 1]


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
def test_a_file_imports_lower_rooms_only(path: Path) -> None:
    assert breaches(module_name(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_private_torch_names_are_at_home(path: Path) -> None:
    if room(module_name(path)) != "_compat":
        assert private_torch_names(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_no_files_import_each_other() -> None:
    assert cycles({module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}) == []


def test_a_cycle_is_seen() -> None:
    sources = {
        "planner.a": "def f():\n    from planner.b import x",
        "planner.b": "from planner import c",
        "planner.c": "import planner.a",
    }
    assert cycles({name: ast.parse(source) for name, source in sources.items()}) == [set(sources)]


def test_every_file_is_in_a_room() -> None:
    tops = {module_name(path).split(".")[1] for path in FILES if module_name(path) != "planner"}
    assert tops <= set(ROOMS)


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("planner.graph.graph", "from planner.solver.solve import solve", "above it"),
        ("planner.solver.solve", "import torch", "never sees torch"),
        ("planner.solver.solve", "def f():\n    from torch.fx import Node", "never sees torch"),
        ("planner.results.plan", "import networkx as nx", "never sees networkx"),
        ("planner.tracer.lower", "from planner.solver import solve", "meet above both only"),
        ("planner.solver.solve", "from planner.tracer import lower", "meet above both only"),
        ("planner.runtime.module", "from planner.api import plan", "above it"),
        ("planner.report.table", "import planner.cli", "above it"),
        ("planner.report.table", "import planner", "public face"),
        ("planner.graph.graph", "import importlib\nimportlib.import_module('planner.api')", "above it"),
        ("planner.graph.graph", "from importlib import import_module\nimport_module(f'planner.{x}')", "builds the name"),
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


def table_of_rooms() -> list[list[str]]:
    """The rows of CONTRIBUTING's table: room, what it contains, third-party packages."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text[text.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def test_contributing_lists_the_rooms_in_their_order() -> None:
    assert [name for name, _, _ in table_of_rooms()] == list(ROOMS)


def test_contributing_lists_the_third_party_packages() -> None:
    listed = {name: {*packages.split(", ")} - {""} for name, _, packages in table_of_rooms() if packages != "any"}
    assert listed == {name: set(packages) for name, packages in THIRD_PARTY.items()}
