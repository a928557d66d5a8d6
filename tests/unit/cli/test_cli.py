"""The command line: the same table, exit codes 0 and 1, one-line errors, clean stdout."""

import json
import re
import subprocess
import sys

import pytest

from planner import Plan, Sweep
from planner.cli import main
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.results import plan_file
from planner.solver.solve import Solver
from tests.support import graphs
from tests.support.models import MODEL_FILE
from tests.support.paths import ROOT
from tests.support.pictures import is_png, is_svg
from tests.support.sweeps import sweep_of
from tests.support.text import unwrapped


def only_error(err):
    """The line of the error, which is all on stderr beside a line per stage."""
    (found,) = [line for line in err.splitlines() if not re.fullmatch(r"planner: .{3,40} \.\.\.", line)]
    return found


@pytest.fixture
def blocks(tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text(plan_file.dumps(graphs.blocks(8)))
    return str(path)


def test_solves_a_graph_file_and_saves_the_plan(blocks, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["solve", blocks, "--budget", "0.7", "--save", str(out)]) == 0
    text = unwrapped(capsys.readouterr().out)
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
    [(["--budget", "1"], "InfeasibleBudgetError"), (["--budget", "soon"], "BudgetError"), (["--sweep", "0"], "BudgetError")],
)
def test_solve_errors_are_one_line_and_exit_1(blocks, arguments, message, capsys):
    assert main(["solve", blocks, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in only_error(captured.err)


def test_the_number_that_solve_names_works(tmp_path, capsys):
    graph, path = graphs.blocks(8), str(tmp_path / "plan.json")
    peak_bytes = simulate(graph, keep_all(graph)).peak_bytes
    Plan(graph, peak_bytes, 5, Solver(graph).solve(peak_bytes - 5)).save(path)  # 5 bytes are left to the allocator
    capsys.readouterr()
    assert main(["solve", path, "--budget", "1"]) == 1
    error = only_error(capsys.readouterr().err)
    enough = int(re.search(r"Raise the budget to .*? \((\d+) bytes\): budget 1 B is below", error)[1])
    assert main(["solve", path, "--budget", str(enough)]) == 0
    assert main(["solve", path, "--budget", str(enough - 1)]) == 1


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
    (tmp_path / "my_model.py").write_text(MODEL_FILE)
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
    assert captured.out == "" and message in only_error(captured.err)


def test_exports_a_budget_and_a_saved_plan_as_the_same_file(target, tmp_path, capsys):
    saved, one, other = tmp_path / "plan.json", tmp_path / "one.py", tmp_path / "other.py"
    assert main(["plan", target, "--budget", "0.7", "--costs", "estimate", "--save", str(saved)]) == 0
    assert main(["export", target, "--plan", str(saved), "-o", str(one)]) == 0
    assert f"written to {one}" in capsys.readouterr().out
    assert main(["export", target, "--budget", "0.7", "--costs", "estimate", "-o", str(other)]) == 0
    step = "class Sequential(nn.Module)"
    assert one.read_text().partition(step)[2] == other.read_text().partition(step)[2] != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.7", "-o", "model.txt"], "give a file name that Python can import"),
        (["--budget", "0.7", "-o", "nowhere/model.py"], "there is no folder nowhere"),
        (["--plan", "none.json", "-o", "model.py"], "none.json"),
    ],
)
def test_export_errors_are_one_line_and_exit_1(target, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", target, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in only_error(captured.err)


@pytest.mark.parametrize("bad", ["nowhere.py:build", "build", "{path}:missing", "{path}:wrong"])
def test_bad_target(target, bad, capsys):
    assert main(["plan", bad.format(path=target.removesuffix(":build")), "--budget", "0.7"]) == 1
    assert "InputError" in capsys.readouterr().err


def test_runs_as_a_program_with_a_clean_stdout(target):
    run = [sys.executable, "-W", "error", "-m", "planner.cli", "plan", target, "--budget", "0.8", "--costs", "estimate"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("budget") and "HiGHS (" not in done.stdout


@pytest.fixture
def plan_path(blocks, tmp_path):
    path = tmp_path / "plan.json"
    assert main(["solve", blocks, "--budget", "0.7", "--save", str(path)]) == 0
    return str(path)


@pytest.fixture
def sweep_path(tmp_path):
    path = tmp_path / "sweep.json"
    sweep_of(graphs.blocks(8), points=4).save(path)
    return str(path)


def test_sweeps_measures_draws_and_saves(target, tmp_path, capsys):
    picture, saved = tmp_path / "sweep.png", tmp_path / "sweep.json"
    options = ["--costs", "estimate", "--points", "3", "--effort", "1", "--verify", "2"]
    assert main(["sweep", target, *options, "--plot", str(picture), "--save", str(saved)]) == 0
    text = capsys.readouterr().out
    for part in ("<- knee", "floor", "measured peak", "sweep written to", "picture written to"):
        assert part in text
    assert is_png(picture) and len(Sweep.load(saved).measured) == 2


def test_sweep_prints_json_alone(target, tmp_path, capsys):
    options = ["--costs", "estimate", "--points", "2", "--low", "0.7", "--high", "0.9", "--effort", "1", "--json"]
    assert main(["sweep", target, *options, "--save", str(tmp_path / "sweep.json")]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert len(figures["points"]) == 2 and figures["knee"]["overhead"] >= 0
    assert all(point["peak_bytes"] <= point["budget_bytes"] for point in figures["points"])
    assert "sweep written" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points", "0"], "BudgetError"),
        (["--low", "0.9", "--high", "0.8"], "BudgetError"),
        (["--high", "1TiB"], "BudgetError"),
        (["--low", "nan"], "BudgetError"),
        (["--plot", "sweep.bmp"], "InputError"),
        (["--points", "2", "--effort", "1", "--verify", "0"], "InputError"),
    ],
)
def test_sweep_errors_are_one_line_and_exit_1(target, options, message, capsys):
    assert main(["sweep", target, "--costs", "estimate", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in only_error(captured.err)


def test_shows_a_plan_with_timeline_and_trace(plan_path, tmp_path, capsys):
    picture, trace = tmp_path / "step.png", tmp_path / "step.json"
    assert main(["show", plan_path, "--timeline", str(picture), "--trace", str(trace)]) == 0
    text = unwrapped(capsys.readouterr().out)
    assert "optimality" in text and "picture written to" in text and "trace written to" in text
    assert is_png(picture) and json.loads(trace.read_text())["traceEvents"]


def test_shows_a_sweep(sweep_path, tmp_path, capsys):
    assert main(["show", sweep_path, "--plot", str(tmp_path / "sweep.svg")]) == 0
    assert "<- knee" in capsys.readouterr().out
    assert is_svg(tmp_path / "sweep.svg")
    assert main(["solve", sweep_path, "--budget", "0.8"]) == 0


def test_explains_a_plan_file_and_a_model(plan_path, target, capsys):
    assert main(["explain", plan_path]) == 0
    text = capsys.readouterr().out
    assert "freed per ms" in text and "would save" in text
    assert main(["explain", target, "--costs", "estimate", "--budget", "0.8", "--effort", "2"]) == 0
    assert "0-5.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{plan}", "--plot", "a.png"], "--plot is for a sweep"),
        (["show", "{sweep}", "--timeline", "a.png"], "--timeline is for a plan"),
        (["show", "{plan}", "--timeline", "a.bmp"], "InputError"),
        (["show", "none.json"], "PlanFileError"),
        (["show", "{graph}"], "PlanFileError"),
        (["explain", "none.json"], "PlanFileError"),
        (["explain", "{plan}", "--budget", "0.5"], "has a budget"),
        (["explain", "model.py:build"], "give a --budget"),
        (["explain", "model", "--budget", "0.5"], "InputError"),
    ],
)
def test_show_and_explain_errors_are_one_line_and_exit_1(plan_path, sweep_path, blocks, arguments, message, capsys):
    capsys.readouterr()
    assert main([argument.format(plan=plan_path, sweep=sweep_path, graph=blocks) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in only_error(captured.err)


@pytest.mark.parametrize("command", ["show", "explain"])
def test_saved_plans_are_read_without_torch(plan_path, command):
    script = "import sys; sys.modules['torch'] = None; from planner.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, command, plan_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_show_and_explain_print_json_alone(plan_path, tmp_path, capsys):
    made = Plan.load(plan_path)
    capsys.readouterr()
    assert main(["show", plan_path, "--json", "--trace", str(tmp_path / "trace.json")]) == 0
    told = capsys.readouterr()
    shown = json.loads(told.out)
    assert (shown["peak_bytes"], shown["budget_bytes"]) == (made.peak_bytes, made.budget_bytes)
    assert shown["num_recomputes"] == len(made.solution.schedule.recomputes()) > 0
    assert "trace written" in told.err
    assert main(["explain", plan_path, "--json", "--effort", "1"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["peak_bytes"] == made.peak_bytes and explained["prices"]["less"]["budget_bytes"] < made.budget_bytes
    assert sum(row["recomputed_ns"] for row in explained["modules"]) == made.timeline.time_ns - made.plain.time_ns


def test_plan_prints_json_with_what_verify_measured(target, tmp_path, capsys):
    assert main(["plan", target, "--budget", "0.8", "--verify", "--json", "--save", str(tmp_path / "plan.json")]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["measured"]["differences"] == [] and found["measured"]["measured_peak_bytes"] <= found["budget_bytes"]
    assert "plan written" in told.err


BROKEN = """
import torch
from torch import nn
import HELPER

class Views(nn.Linear):
    def forward(self, x):
        return super().forward(x).view(3, 100)

def raises():
    return {}["key"]

def leaves():
    raise SystemExit(3)

def of_helper():
    return HELPER.build()

def in_forward():
    return Views(4, 4), (torch.randn(2, 4),), {}
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "KeyError: 'key' at broken.py:11"),
        ("leaves", "SystemExit: 3 at broken.py:14"),
        ("of_helper", "ZeroDivisionError: division by zero at HELPER.py:2"),
        ("in_forward", "at broken.py:8 raises RuntimeError: shape '[3, 100]' is invalid for input of size 8"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "estimate"])
def test_an_error_of_the_users_file_is_one_line_with_file_line_and_message(command, function, message, tmp_path, capsys):
    helper = f"helper_of_{command}_{function}"  # modules stay imported
    (tmp_path / "broken.py").write_text(BROKEN.replace("HELPER", helper))
    (tmp_path / f"{helper}.py").write_text("def build():\n    return 1 / 0\n")
    budget = ["--budget", "0.7"] if command == "plan" else []
    assert main([command, f"{tmp_path / 'broken.py'}:{function}", *budget]) == 1
    printed = capsys.readouterr()
    assert message.replace("HELPER", helper) in only_error(printed.err) and printed.out == ""


def test_what_is_no_error_of_the_users_is_one_line_too(target, monkeypatch, capsys):
    monkeypatch.setattr("planner.api.plan", lambda *given, **options: [][0])
    assert main(["plan", target, "--budget", "0.7"]) == 1
    assert "IndexError: list index out of range. (--log-level debug shows the traceback)" in only_error(capsys.readouterr().err)
    assert main(["plan", target, "--budget", "0.7", "--log-level", "debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_each_stage_is_a_line_where_stderr_is_no_terminal(target, capsys):
    assert main(["plan", target, "--budget", "0.7", "--costs", "estimate", "--verify"]) == 0
    lines = [f"planner: {name} ..." for name in ("build my_model.py:build", "capture", "solve", "run one step")]
    assert capsys.readouterr().err.splitlines() == [*lines, "planner: run plain and planned steps ..."]


def test_doctor_fails_where_something_prevents_planning(target, tmp_path, capsys):
    assert main(["doctor", target]) == 0 and "Sequential can be planned" in capsys.readouterr().out
    (tmp_path / "rows.py").write_text(
        "import torch\nclass Rows(torch.nn.Linear):\n"
        "    def forward(self, x):\n        return super().forward(x[x[:, 0] > 0])\n"
        "def build():\n    return Rows(4, 1), (torch.randn(3, 4),), {}\n"
    )
    assert main(["doctor", f"{tmp_path / 'rows.py'}:build"]) == 1
    assert "CANNOT be planned" in capsys.readouterr().out


def test_estimates_and_says_by_its_code_whether_it_fits(target, capsys):
    options = ["--costs", "estimate", "--effort", "0.1"]
    assert main(["estimate", target, "--memory", "1GiB", *options]) == 0
    assert "fits: 102" in capsys.readouterr().out
    assert main(["estimate", target, "--memory", "9KiB", *options]) == 1
    assert "no plan can help" in unwrapped(capsys.readouterr().out)
    assert main(["estimate", target, "--meta", "--device", "H100", "--autocast", "bfloat16", *options[2:]]) == 0
    assert "H100-80GB" in capsys.readouterr().out
