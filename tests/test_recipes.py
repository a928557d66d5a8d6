"""Every recipe of docs/recipes.md runs, trains planned, and trains as it does without a plan, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import planner
from planner import CheckpointedModule
from tests.support.paths import ROOT

PAGE = "docs/recipes.md"
RECIPES = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```$", (ROOT / PAGE).read_text(encoding="utf-8"), re.M | re.S))
ROUNDED = {"Compile"}
"""Whose results differ from eager's by rounding."""
MARKS = {"Compile": pytest.mark.zoo, "diffusers": pytest.mark.field}
"""What takes long, and what needs a package that the tests do without."""


def run(code: str, where: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "recipe"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, where, "exec"), names)
    return names


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ()), id=name) for name in RECIPES])
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed: list[CheckpointedModule] = []
    install = planner.install
    monkeypatch.setattr(planner, "install", lambda model, *planned: (installed.extend(planned), install(model, *planned)))
    after = run(RECIPES[name], f"{PAGE} {name}")
    monkeypatch.setattr(planner, "install", lambda *_: None)
    before = run(RECIPES[name], f"{PAGE} {name}, without the plan")
    assert installed and all(module.num_planned_calls for module in installed)
    trained = after["model"].state_dict()
    assert trained.keys() == before["model"].state_dict().keys()
    for key, tensor in before["model"].state_dict().items():
        close = torch.allclose(tensor, trained[key], atol=1e-6) if name in ROUNDED else torch.equal(tensor, trained[key])
        assert close, key


def test_the_table_of_recipes_is_complete() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert re.findall(r"\| \[(.+?)\]\(#", text) == list(RECIPES) == re.findall(r"^## (.+)$", text, re.M)
