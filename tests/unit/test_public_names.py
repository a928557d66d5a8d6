"""The public face: one list of names, lazily imported, typed, with the last release's names still there."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import planner
from planner import PlannerError, errors

FILE = Path(planner.__file__)


def imported_for_type_checkers():
    """(module, name) of the imports under `if TYPE_CHECKING`, and those that are made at once."""
    lazily, at_once = set(), set()
    for node in ast.parse(FILE.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.If) else [node]
        for each in inner:
            if isinstance(each, ast.ImportFrom) and each.module.startswith("planner."):
                assert all(alias.asname == alias.name for alias in each.names), "`name as name` makes it public"
                (lazily if isinstance(node, ast.If) else at_once).update((each.module, alias.name) for alias in each.names)
    return lazily, at_once


def test_the_table_the_imports_and_all_agree():
    lazily, at_once = imported_for_type_checkers()
    assert lazily == {(home, name) for home, names in planner._HOMES.items() for name in names}
    assert sorted(name for _, name in lazily | at_once) == planner.__all__ == sorted(set(planner.__all__))


@pytest.mark.parametrize("name", planner.__all__)
def test_every_name_is_what_its_module_holds(name):
    home = planner._HOME.get(name, "planner.errors")
    assert getattr(planner, name) is getattr(import_module(home), name)
    assert name in dir(planner)


def test_every_error_is_public():
    raised = {name for name, it in vars(errors).items() if isinstance(it, type) and issubclass(it, PlannerError)}
    assert raised and raised <= set(planner.__all__)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'Plans'"):
        _ = planner.Plans


def test_former_names_warn_and_work():
    for former, now in planner._FORMER.items():
        with pytest.warns(DeprecationWarning, match=f"planner.{former} is now planner.{now}") as caught:
            assert getattr(planner, former) is getattr(planner, now)
        assert caught[0].filename == __file__
        assert former not in planner.__all__


def test_the_version_is_that_of_the_installed_package(monkeypatch):
    assert isinstance(planner.__version__, str) and planner.__version__[0].isdigit()
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"checkpoint-planner": "1.2.3"}[name])
    assert planner.__version__ == "1.2.3"

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert planner.__version__ == "0+unknown"


def test_the_package_is_typed():
    import tomllib

    root = FILE.parent.parent
    assert (FILE.parent / "py.typed").is_file()
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["planner"]
    others = {path for path in FILE.parent.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == {path for pattern in patterns for path in FILE.parent.glob(pattern)}, "the wheel brings every file"


@pytest.mark.parametrize(
    "line",
    [
        "import planner",
        "from planner import BudgetError, InfeasibleBudgetError",
        "from planner.cli import main",
        "from planner import PlanOptions",
    ],
)
def test_imports_that_bring_no_torch_and_no_solver(line):
    heavy = "{'torch', 'numpy', 'highspy', 'pulp', 'networkx', 'rich'}"
    script = f"import sys; {line}; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=FILE.parent.parent)
    assert done.returncode == 0, done.stderr


def test_a_former_error_is_caught_by_its_former_name():
    with pytest.warns(DeprecationWarning):
        former = planner.PlanMissError
    try:
        raise planner.MismatchError("input 0")
    except former as error:
        assert str(error) == "input 0"
