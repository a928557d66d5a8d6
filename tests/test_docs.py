"""Documents are true: links, paths, names and options in them exist, their code runs, README shows what the code prints."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import planner
from planner import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
README = ROOT / "README.md"
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=IDS)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w/.-])(?:planner|benchmarks|examples|docs|tests)/[\w./-]*[\w/]")
_DOTTED = re.compile(r"(?<![\w/.-])planner(?:\.[A-Za-z_]\w*)+")
_OPTION = re.compile(r"^([a-z_]+)=")
TORCHS_OPTIONS = {"cache_enabled", "create_graph", "drop_last", "preserve_rng_state", "set_to_none"}
"""Options of torch's functions, which documents speak of, too."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def inline_code(text: str) -> list[str]:
    """What stands between backticks outside of fenced blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings, and the site to what the reference describes."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}.union(names)


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column has this head, without the head."""
    lines = text[text.index(f"\n| {first} |") + 1 :].splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


# What does not exist


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to no file, or to no heading of a page."""
    found = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        known = text if target == page else text_of(target) if target.suffix == ".md" and target.is_file() else ""
        if not target.exists() or (anchor and anchor not in anchors(known)):
            found.append(link)
    return found


def missing_paths(text: str) -> list[str]:
    """Paths into this repository where nothing lies."""
    return sorted({path for path in _PATH.findall(text) if not (ROOT / path).exists()})


def _exists(dotted: str) -> bool:
    here: Any = planner
    name = "planner"
    for part in dotted.split(".")[1:]:
        name = f"{name}.{part}"
        try:
            here = importlib.import_module(name) if inspect.ismodule(here) and not hasattr(here, part) else getattr(here, part)
        except (ImportError, AttributeError):
            return False
    return True


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "planner":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def missing_names(text: str) -> list[str]:
    """Dotted names of the package, and names that code imports from it, which do not exist."""
    names = set(_DOTTED.findall(re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)))
    names -= {name for name in names if name.endswith((".json", ".py"))}
    for block in blocks(text, "python"):
        names.update(_imported(ast.parse(block)))
    return sorted(name for name in names if not _exists(name))


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _public_functions() -> dict[str, Any]:
    return {name: getattr(planner, name) for name in planner.__all__ if inspect.isfunction(getattr(planner, name))}


def _calls(text: str) -> Iterator[ast.Call]:
    for code in (*inline_code(text), *blocks(text, "python")):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def unknown_options(text: str) -> list[str]:
    """Keywords of public functions that they do not take, in calls and by themselves (`reserve="1GiB"`)."""
    functions = _public_functions()
    every = TORCHS_OPTIONS.union(*map(_parameters, functions.values()))
    found = {match[1] for code in inline_code(text) if (match := _OPTION.match(code)) and match[1] not in every}
    for call in _calls(text):
        if isinstance(call.func, ast.Name) and call.func.id in functions:
            known = _parameters(functions[call.func.id])
            found.update(f"{call.func.id}: {each.arg}" for each in call.keywords if each.arg and each.arg not in known)
    return sorted(found)


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    fenced = [line for block in blocks(text, "") for line in block.splitlines()]
    for line in (*inline_code(text), *fenced):
        for words in re.findall(r"(?:^|/)planner ([a-z][a-z-]+(?: [^&]*)?)", line):
            command, *rest = words.split()
            yield command, re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", " ".join(rest))


@cache
def help_of(command: str) -> str | None:
    """The help text of a command of the shell; None where there is no such command."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()), pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    return None if ended.value.code else out.getvalue()


def unknown_flags(text: str) -> list[str]:
    """Commands and flags of the shell that do not exist."""
    found = set()
    for command, flags in _commands(text):
        known = help_of(command)
        if known is None:
            found.add(command)
        else:
            found.update(f"{command} {flag}" for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", known))
    return sorted(found)


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


@EACH_PAGE
def test_paths_exist(page: Path) -> None:
    assert missing_paths(text_of(page)) == []


@EACH_PAGE
def test_names_exist(page: Path) -> None:
    assert missing_names(text_of(page)) == []


@EACH_PAGE
def test_options_exist(page: Path) -> None:
    assert unknown_options(text_of(page)) == []


@EACH_PAGE
def test_commands_and_flags_exist(page: Path) -> None:
    assert unknown_flags(text_of(page)) == []


def test_what_is_wrong_is_found() -> None:
    text = (
        "# A b: c\n[x](README.md) [x](#a-b-c) [x](nowhere.md) [x](#nothing) [x](docs/limits.md#the-log) [x](docs/limits.md#b)\n"
        "`planner/graph/graph.py` `planner/nowhere.py` planner.plan planner.nothing.at_all `planner.graph.simulate.simulate`\n"
        "`plan(model, 1, effrot=2)` `effort=3` `effrot=4` `planner plan A:b --budget 1`\n"
        "`planner plan A:b --budgte 1` `planner paln`\n"
        "```python\nfrom planner import plan, plam\n```\n"
    )
    assert broken_links(README, text) == ["nowhere.md", "#nothing", "docs/limits.md#b"]
    assert missing_paths(text) == ["planner/nowhere.py"]
    assert missing_names(text) == ["planner.nothing.at_all", "planner.plam"]
    assert unknown_options(text) == ["effrot", "plan: effrot"]
    assert unknown_flags(text) == ["paln", "plan --budgte"]


# CONTRIBUTING


def test_contributing_says_where_things_are() -> None:
    rows = table(text_of(ROOT / "CONTRIBUTING.md"), "question")
    assert len(rows) >= 8
    for _, file, name in rows:
        tree = ast.parse(text_of(ROOT / file.strip("`")))
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert name.strip("`") in defined, f"{file} has no {name}"


# README


def test_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 120


def test_readme_names_the_supported_versions_of_torch() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    (torch_range,) = [dependency for dependency in project["dependencies"] if dependency.startswith("torch>")]
    first, above = re.findall(r"2\.(\d+)", torch_range)
    words = f"2.{first} to 2.{int(above) - 1}"
    assert words in text_of(README) and f"| torch | {words}." in text_of(ROOT / "docs" / "limits.md")


def test_readme_quotes_the_results() -> None:
    results = text_of(ROOT / "docs" / "results.md").splitlines()
    for row in table(text_of(README), "model"):
        model, budget, plain, planned, time, method, *rest = row
        ours = [line for line in results if line.startswith(f"| {model} | {budget} | {plain.removesuffix(' MiB')} | ")]
        assert len(ours) == 1 and f"| {planned.removesuffix(' MiB')} | " in ours[0] and f"| {time} | " in ours[0], row
        theirs = [line for line in results if line.startswith(f"| {model} | {method} | ")]
        assert len(theirs) == 1 and all(re.search(rf"[ ,|] {re.escape(cell)} \|", theirs[0]) for cell in rest), row


def test_readme_shows_what_the_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Labels, modules and figures; times of the solver and what the check measures differ from run to run."""
    text = text_of(README)
    command, release = re.search(r"^`planner ([^`]+)`, torch ([\d.]+),", text, re.MULTILINE).groups()
    (shown,) = [block for block in blocks(text, "") if block.startswith("budget")]
    assert cli.main([*command.split(), "--no-check"]) == 0
    printed = capsys.readouterr().out
    is_same_torch = torch.__version__.startswith(release)  # another release may capture other kernels
    lines = _lines(printed, is_same_torch)
    missing = [line for line in _lines(shown, is_same_torch) if line not in lines and line != "..."]
    assert not missing, f"README shows {missing}; this is printed:\n{printed}"


def _lines(text: str, figures: bool) -> list[str]:
    text = re.sub(r"[\u2500-\u257f]", " ", text)
    text = re.sub(r"\n {6,}(?=\S)", " ", text)  # lines that were broken
    text = re.sub(r", ([\d.]+ \w+ measured|not measured \(.*\))$", "", text, flags=re.MULTILINE)
    text = re.sub(r"in [\d.]+ m?s,", "in ... s,", text)
    text = text if figures else re.sub(r"[\d.]+( [KMG]?i?B| [mun]?s)?|->.*", "", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def run(source: str, where: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run code of a document; the names that it leaves."""
    names = {} if names is None else names
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(source, where, "exec"), names)
    return names


def test_readmes_loop_trains_alike_before_and_after() -> None:
    (diff,) = blocks(text_of(README), "diff")
    lines = diff.splitlines()
    assert {line[:1] for line in lines} == {" ", "+", ""}, "the loop as it was stays as it is"
    before = run("\n".join(line[1:] for line in lines if line[:1] != "+"), "README.md before")
    after = run("\n".join(line[1:] for line in lines), "README.md after")
    assert after["report"].exact and after["report"].within_budget
    assert after["planned"].num_planned_calls == len(after["batches"])
    for name, weight in before["model"].state_dict().items():
        assert torch.equal(weight, after["model"].state_dict()[name]), name


# The site


def test_the_site_loads_nothing_from_the_network() -> None:
    site = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    assert site["theme"]["font"] is False and site["strict"] and site["extra"]["generator"] is False
    given = [*site.get("extra_css", ()), *site.get("extra_javascript", ())]
    assert all((ROOT / "docs" / file).is_file() for file in given)


def pages_of(nav: Any) -> Iterator[str]:
    """The pages in a site's navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    shown = list(pages_of(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]))
    there = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(shown) == sorted(there)


# The reference


def described(page: str) -> list[str]:
    """The names that a page of the reference describes."""
    return re.findall(r"^::: planner\.(\w+)$", text_of(ROOT / "docs" / "api" / page), re.MULTILINE)


def test_the_reference_describes_every_public_name_once() -> None:
    pages = [page.name for page in (ROOT / "docs" / "api").glob("*.md")]
    assert sorted(name for page in pages for name in described(page)) == sorted(planner.__all__)


def undocumented(kind: type) -> list[str]:
    """Public methods and properties of a class without a docstring, and fields that its docstring does not list."""
    ours = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in ("planner", "tests")]
    listed = " ".join(base.__doc__ or "" for base in ours)
    found = []
    for base in ours:
        for name, member in vars(base).items():
            if name.startswith("_"):
                continue
            is_field = name in getattr(base, "__dataclass_fields__", ()) or inspect.ismemberdescriptor(member)
            text = listed if is_field else inspect.getdoc(getattr(member, "__func__", member))
            if not text or (is_field and not re.search(rf"\b{name}\b[^:\n]*:", listed)):
                found.append(f"{kind.__name__}.{name}")
        for name in getattr(base, "__dataclass_fields__", ()):
            if not name.startswith("_") and not re.search(rf"\b{name}\b[^:\n]*:", listed):
                found.append(f"{kind.__name__}.{name}")
    return sorted(set(found))


HELD = [name for name in planner.__all__ if inspect.isclass(getattr(planner, name)) and name != "PlanOptions"]  # has help texts


@pytest.mark.parametrize("name", HELD)
def test_what_users_hold_is_documented(name: str) -> None:
    assert undocumented(getattr(planner, name)) == []


@pytest.mark.parametrize("name", _public_functions())
def test_public_functions_are_documented(name: str) -> None:
    function = getattr(planner, name)
    text = inspect.getdoc(function) or ""
    taken = [each for each in inspect.signature(function).parameters if each != "options"]
    missing = [each for each in taken if not re.search(rf"\b{each}\b[^:\n]*:", text)]
    assert text and not missing


def test_what_is_not_documented_is_found() -> None:
    @dataclass
    class Thing:
        """A thing.

        Attributes:
            known: this.
        """

        known: int
        unknown: int = 0

        def said(self) -> None:
            """It."""

        def silent(self) -> None:
            pass

    assert undocumented(Thing) == ["Thing.silent", "Thing.unknown"]


# Troubleshooting


def test_every_error_and_warning_has_its_cure() -> None:
    text = text_of(ROOT / "docs" / "troubleshooting.md")
    kinds = {
        name for name in planner.__all__ if inspect.isclass(it := getattr(planner, name)) and issubclass(it, BaseException)
    }
    headings = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert set(headings) == kinds and len(headings) == len(kinds)
    errors, _, warned = text.partition("\n## Warnings\n")
    assert headings[:-1] == sorted(headings[:-1]) and "### MismatchWarning" in warned and "### MismatchWarning" not in errors


def quoted_beginnings() -> list[str]:
    """How the errors of the first hour begin, as the page quotes them."""
    rows = table(text_of(ROOT / "docs" / "troubleshooting.md"), "the error begins with")
    return [text for row in rows for text in re.findall(r"`(.+?)`", row[0])]


RAISED_IN = ("test_first_hour.py", "test_bad_input.py", "test_distributed_safety.py")
"""Tests that make these mistakes and compare how the error begins."""


@pytest.mark.parametrize("beginning", quoted_beginnings())
def test_the_errors_of_the_first_hour_are_raised_in_tests(beginning: str) -> None:
    assert any(beginning in text_of(ROOT / "tests" / "integration" / file).replace("\\", "") for file in RAISED_IN)


def test_the_warnings_are_said_so() -> None:
    text = text_of(ROOT / "docs" / "troubleshooting.md").partition("\n## Warnings\n")[2]
    quotes = [quote for quote in re.findall(r'\*"([^"]+)"\*', text) if not quote.startswith("...")]
    assert len(quotes) >= 3
    source = "".join(text_of(file) for file in sorted((ROOT / "planner").rglob("*.py")))
    said = " ".join(re.sub(r'"\s*\n\s*f?"', "", source).split())
    assert [quote for quote in quotes if " ".join(quote.split()) not in said] == []


# Code

RUN_ELSEWHERE = {"usage", "tutorial", "recipes"}
"""Below, in tests/integration/test_examples.py, and in tests/test_recipes.py."""
WITH_CODE = [page for page in PAGES if page.parent.name == "docs" and blocks(text_of(page), "python")]
SHOWN = [page for page in WITH_CODE if page.stem not in RUN_ELSEWHERE]
GIVEN = {
    "limits": "import torch\nmodel, args = torch.nn.Linear(4, 4), (torch.randn(2, 4),)",
    "integrations": """
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

model = torch.nn.Linear(4, 4)
optimizer, data = torch.optim.SGD(model.parameters()), [torch.randn(4)]
loader, accelerator = torch.utils.data.DataLoader(data), Accelerator(cpu=True)
arguments = TrainingArguments("out", use_cpu=True, report_to="none")
""",
}
"""What a page takes for granted."""


@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")  # Lightning's default logger
@pytest.mark.parametrize("page", SHOWN, ids=[page.stem for page in SHOWN])
def test_the_code_of_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("planner").level
    try:
        names = run(GIVEN.get(page.stem, ""), "what is given")
        for block in blocks(text_of(page), "python"):
            run(block, page.name, names)
    finally:
        logging.getLogger("planner").setLevel(level)


def test_the_code_of_usage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(text_of(ROOT / "docs" / "usage.md"), "python"):
        run(block, "docs/usage.md", names)
    assert names["report"].exact and names["report"].within_budget
    assert names["sized"].num_planned_calls == 1 and names["again"].plan.peak_bytes == names["planned"].plan.peak_bytes
    assert (tmp_path / "model_ckpt.py").is_file() and names["children"].planned
