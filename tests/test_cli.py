"""The command line: the same table, exit codes 0 and 1, one-line errors, clean stdout."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from planner import Plan
from planner.cli import main
from planner.graph import planfile
from tests import graphs

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)]), (torch.randn(512, 64),), {}

def wrong():
    return 3
"""


def rendered(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def blocks(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text(planfile.dumps(graphs.blocks(8)))
    return str(path)


def test_solves_a_graph_file_and_saves_the_plan(blocks, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["solve", blocks, "--budget", "0.7", "--save", str(out)]) == 0
    text = capsys.readouterr().out
    assert "optimality" in text and "for this backward order at these costs" in text
    saved = Plan.load(out)
    assert saved.peak_bytes <= 0.7 * saved.plain.peak_bytes
    assert saved.solution.schedule.recomputes()


def test_sweeps_a_graph_file(blocks, capsys):
    assert main(["solve", blocks, "--sweep", "5"]) == 0
    text = capsys.readouterr().out
    assert "100.0%" in text and text.count("%") >= 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--budget", "1"], "InfeasibleBudgetError"), (["--budget", "soon"], "BudgetError"), (["--sweep", "0"], "InputError")],
)
def test_solve_errors_are_one_line_and_exit_1(blocks, arguments, message, capsys):
    assert main(["solve", blocks, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_missing_graph_file_is_named(tmp_path, capsys):
    assert main(["solve", str(tmp_path / "none.json"), "--budget", "0.5"]) == 1
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--budget", "0.7"], ["--sweep", "3"]])
def test_solve_needs_no_torch(blocks, arguments):
    script = "import sys; sys.modules['torch'] = None; from planner.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "solve", blocks, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


@pytest.fixture
def target(tmp_path):
    (tmp_path / "my_model.py").write_text(MODEL)
    return f"{tmp_path / 'my_model.py'}:build"


def test_plans_verifies_and_saves(target, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", target, "--budget", "0.7", "--costs", "estimate", "--verify", "--save", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("budget", "peak", "step time", "optimality", "recomputed", "bit-equal", "kept)"):
        assert part in text
    assert Plan.load(out).solution.schedule.recomputes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "BudgetError"),
        (["--budget", "1KiB"], "InfeasibleBudgetError"),
        (["--budget", "0.7", "--loss", "nothing"], "InputError"),
    ],
)
def test_errors_are_one_line_and_exit_1(target, arguments, message, capsys):
    assert main(["plan", target, "--costs", "estimate", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize("bad", ["nowhere.py:build", "build", "{path}:missing", "{path}:wrong"])
def test_bad_target(target, bad, capsys):
    assert main(["plan", bad.format(path=target.removesuffix(":build")), "--budget", "0.7"]) == 1
    assert "InputError" in capsys.readouterr().err


def test_runs_as_a_program_with_a_clean_stdout(target):
    run = [sys.executable, "-W", "error", "-m", "planner.cli", "plan", target, "--budget", "0.8", "--costs", "estimate"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("budget") and "HiGHS (" not in done.stdout
