"""`planner report`: of a saved plan, of a saved sweep, of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner import cli
from planner.report.html import page
from tests.support import graphs
from tests.support.sweeps import plan_of, sweep_of

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
    return model, (torch.randn(1024, 64),), {}
"""


def is_report(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text.startswith("<!doctype html>") and 10**6 < len(text) <= page.MOST_BYTES


def test_of_a_saved_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(graphs.in_modules()).save(tmp_path / "plan.json")
    assert cli.main(["report", str(tmp_path / "plan.json"), "-o", str(tmp_path / "plan.html")]) == 0
    assert is_report(tmp_path / "plan.html") and "plan.html" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "plan.json"), "--budget", "0.5"]) == 1
    assert "has a budget" in capsys.readouterr().err


def test_of_a_saved_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(graphs.in_modules(), points=3).save(tmp_path / "sweep.json")
    for budget in ([], ["--budget", "1.0"]):
        assert cli.main(["report", str(tmp_path / "sweep.json"), *budget, "-o", str(tmp_path / "sweep.html")]) == 0
        assert is_report(tmp_path / "sweep.html")
    assert cli.main(["report", str(tmp_path / "sweep.json"), "--verify"]) == 1
    assert "--verify runs a model" in capsys.readouterr().err


def test_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "small_model.py").write_text(MODEL)
    given = [f"{tmp_path / 'small_model.py'}:build", "--budget", "0.8", "--costs", "estimate", "--points", "3"]
    assert cli.main(["report", *given, "-o", str(tmp_path / "model.html")]) == 0
    assert is_report(tmp_path / "model.html")
