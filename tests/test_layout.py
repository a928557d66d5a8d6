"""The order of the tests, read from every import: they share what lies in support/, and unit/ mirrors planner/."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.support.imports import imports, module_name
from tests.support.paths import ROOT

TESTS = ROOT / "tests"
UNIT = TESTS / "unit"
FILES = sorted(path for folder in ("tests", "benchmarks", "examples", "planner") for path in (ROOT / folder).rglob("*.py"))
FOLDERS = ("unit", "integration", "zoo", "fuzz", "gpu")
"""Where tests are, beside those of the tree itself: this file, test_docs.py, test_recipes.py and test_rooms.py."""
HAVE_A_PACKAGE = ("fuzz",)
"""Folders with files of their own beside tests; only they use them."""


def may_import(name: str) -> tuple[str, ...]:
    """What a file may import of `tests`, as prefixes."""
    top, _, rest = name.partition(".")
    if top in ("planner", "examples"):
        return ()
    own = rest.partition(".")[0]
    return ("tests.support", f"tests.{own}") if top == "tests" and own in HAVE_A_PACKAGE else ("tests.support",)


def breaches(name: str, tree: ast.AST) -> list[str]:
    """The imports of `tests` that a file may not have."""
    found = []
    for imported in imports(tree):
        parts = imported.split(".")
        is_allowed = any(imported == prefix or imported.startswith(f"{prefix}.") for prefix in may_import(name))
        if parts[0] == "tests" and (not is_allowed or any(part.startswith("test_") for part in parts)):
            found.append(f"{name} imports {imported}")
    return found


def rooms(folder: Path) -> set[str]:
    """The rooms below a folder: subfolders with Python files, without a leading underscore."""
    return {path.name.removeprefix("_") for path in folder.iterdir() if any(path.glob("*.py"))}


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_tests_share_what_lies_in_support(path: Path) -> None:
    assert breaches(module_name(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_what_is_imported_of_the_project_is_there(path: Path) -> None:
    """Also in files that no test runs: benchmarks of what is renamed would fail when they are needed."""
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] in ("planner", "benchmarks", "tests"):
            assert _is_there(name), f"{path.name} imports {name}"


def _is_there(name: str) -> bool:
    """A module, or an attribute of one."""
    with contextlib.suppress(ModuleNotFoundError):  # it is no module's, where what stands before the dot is no package
        if importlib.util.find_spec(name) is not None:
            return True
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


def test_a_name_that_is_gone_is_found() -> None:
    assert _is_there("planner.composite.kinds.kinds_of") and _is_there("planner.composite")
    assert not _is_there("planner.composite.choose") and not _is_there("planner.composite.kinds.choose")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tests.unit.graph.test_a", "from tests.unit.graph.test_b import x"),
        ("tests.unit.graph.test_a", "from tests.unit.graph import test_b"),
        ("tests.unit.graph.test_a", "from tests.fuzz.generate import x"),
        ("tests.unit.graph.test_a", "import tests.support.test_b"),
        ("tests.fuzz.test_fuzz", "from tests.fuzz.test_other import x"),
        ("tests.support.models", "from tests.integration import test_b"),
        ("benchmarks.zoo", "def f():\n    from tests.zoo.test_zoo import x"),
        ("planner.api", "from tests.support import graphs"),
        ("examples.gpt2", "from tests.support import graphs"),
    ],
)
def test_a_breach_is_seen(name: str, source: str) -> None:
    assert len(breaches(name, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tests.unit.graph.test_a", "from tests.support import graphs"),
        ("tests.fuzz.test_fuzz", "from tests.fuzz.generate import case_of"),
        ("benchmarks.zoo", "from tests.support.zoo.check import MODELS"),
        ("planner.api", "import torch"),
    ],
)
def test_what_is_allowed_is_no_breach(name: str, source: str) -> None:
    assert breaches(name, ast.parse(source)) == []


def test_unit_mirrors_the_package() -> None:
    """Every room with files has a folder of tests, and every folder is named after a room."""
    tested = rooms(UNIT)
    assert rooms(ROOT / "planner") <= tested
    of_files = {path.stem for path in (ROOT / "planner").glob("*.py")}
    assert tested <= rooms(ROOT / "planner") | of_files
    assert all(any((UNIT / room).glob("test_*.py")) for room in tested)


def test_every_test_lies_in_a_folder_of_tests() -> None:
    found = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert found == {*FOLDERS, "test_docs.py", "test_layout.py", "test_recipes.py", "test_rooms.py"}


def test_every_file_of_unit_is_a_test() -> None:
    assert {path.name for path in UNIT.rglob("*.py") if not path.name.startswith("test_")} == {"__init__.py"}
