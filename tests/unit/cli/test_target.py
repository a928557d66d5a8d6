"""FILE.py:FUNCTION: checked before torch is imported, no module of another name is touched, the model is built once."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from planner.cli import main
from planner.cli.target import Target
from planner.errors import InputError
from tests.support.paths import ROOT

MODEL = """
import torch
from torch import nn

BUILT = []


class Net(nn.Linear):
    def __init__(self):
        super().__init__(16, 1)
        BUILT.append(self)


def rows(batch):
    return (torch.zeros(4 * batch, 16),), {}


def build():
    return Net(), *rows(2)


def build_batch(batch=1):
    return Net(), *rows(batch)


def build_once():
    return Net(), rows


def wrong():
    return Net(), 3
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Modules and paths are what they were, after each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {**sys.modules}
    yield
    for name in sys.modules.keys() - before.keys():
        if name.startswith(("_planner_target_", "my_own_model", "sibling")):
            del sys.modules[name]
    assert all(sys.modules[name] is module for name, module in before.items())


def written(folder, name, text=MODEL):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["json.py", "torch.py", "planner.py", "my_own_model.py", "not-a-name.py", "a.b.py"])
def test_modules_of_other_files_stay_what_they_are_and_classes_can_be_pickled(tmp_path, name):
    before = {**sys.modules}
    model, args, kwargs = Target.find(f"{written(tmp_path, name)}:build").build()
    assert {module: sys.modules[module] for module in before} == before
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and torch.equal(again(*args, **kwargs), model(*args, **kwargs))
    assert json.loads("[1]") == [1]


def test_a_file_with_a_name_of_its_own_is_registered_under_it(tmp_path):
    model, _, _ = Target.find(f"{written(tmp_path, 'my_own_model.py')}:build").build()
    assert type(model).__module__ == "my_own_model", "by which another process finds it when it unpickles"
    assert sys.modules["my_own_model"].Net is type(model)
    assert str(tmp_path) in sys.path


def test_two_files_of_one_name_do_not_meet(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, _, _ = Target.find(f"{written(tmp_path / 'a', 'my_own_model.py')}:build").build()
    other, _, _ = Target.find(f"{written(tmp_path / 'b', 'my_own_model.py')}:build").build()
    assert type(one) is not type(other)
    for model in (one, other):
        assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_file_called_torch_finds_torch_and_its_neighbours(tmp_path):
    written(tmp_path, "sibling_of_torch.py", "SIZE = 3\n")
    text = (
        "import torch\nimport sibling_of_torch\n\ndef build():\n    return torch.nn.Linear(sibling_of_torch.SIZE, 1), (), {}\n"
    )
    written(tmp_path, "torch.py", text)
    script = f"from planner.cli.target import Target; print(Target.find({str(tmp_path / 'torch.py') + ':build'!r}).build()[0])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "in_features=3" in done.stdout, done.stderr


def test_a_file_that_fails_leaves_no_module(tmp_path):
    path = written(tmp_path, "my_own_model.py", "x = 1\nraise ValueError('no')\n")
    with pytest.raises(InputError, match=r"cannot be run: ValueError: no at my_own_model.py:2"):
        Target.find(f"{path}:build").build()
    assert "my_own_model" not in sys.modules


def test_a_relative_path_is_found_and_its_line_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "my_own_model.py", "def build():\n    return 1 / 0\n")
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero at my_own_model.py:2"):
        Target.find("my_own_model.py:build").build()


def test_the_model_is_built_once_for_all_batches(tmp_path, capsys):
    path = written(tmp_path, "my_own_model.py")
    options = ["--budget", "3KiB", "--costs", "estimate", "--effort", "1"]
    assert main(["max-batch", f"{path}:build_once", *options]) == 0
    assert len(sys.modules["my_own_model"].BUILT) == 1
    once = capsys.readouterr().out
    del sys.modules["my_own_model"]
    assert main(["max-batch", f"{path}:build_batch", *options]) == 0
    assert capsys.readouterr().out == once
    assert len(sys.modules["my_own_model"].BUILT) > 1, "as its help says"


def test_the_first_batch_is_not_built_twice(tmp_path):
    model, make_inputs = Target.find(f"{written(tmp_path, 'my_own_model.py')}:build_batch").build_batches()
    built = sys.modules["my_own_model"].BUILT
    assert make_inputs(1)[0][0].shape == (4, 16) and built == [model]
    assert make_inputs(3)[0][0].shape == (12, 16) and make_inputs(1)[0][0].shape == (4, 16)


def test_what_takes_no_batch_must_return_a_model_and_its_inputs(tmp_path):
    path = written(tmp_path, "my_own_model.py")
    with pytest.raises(InputError, match=r"build takes no batch=, so it must return \(model, make_inputs\)"):
        Target.find(f"{path}:build").build_batches()
    with pytest.raises(InputError, match="make_inputs is an int"):
        Target.find(f"{path}:wrong").build_batches()


MODEL_COMMANDS = (["plan", "--budget", "0.5"], ["sweep"], ["max-batch", "--budget", "1GiB"], ["explain", "--budget", "0.5"])


@pytest.mark.parametrize(
    "wrong",
    [
        ["nowhere.py:build"],
        ["model"],
        ["README.md:build", "--effort", "-1"],
        ["README.md:build", "--reserve", "much"],
        ["README.md:build", "--device", "H100", "--costs", "measure"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", [*MODEL_COMMANDS, ["export", "--budget", "0.5", "-o", "m.py"]], ids=lambda each: each[0])
def test_arguments_are_checked_before_torch_is_imported(command, wrong, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Target, "_load", lambda _: pytest.fail("the file was run"))
    monkeypatch.setattr("planner.cli.target.Target.build", lambda _: pytest.fail("the file was run"))
    assert main([command[0], *wrong, *command[1:]]) == 1
    assert "Error: " in capsys.readouterr().err


def test_meta_without_a_device_is_refused_before_the_file_is_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Target, "_load", lambda _: pytest.fail("the file was run"))
    assert main(["estimate", "README.md:build", "--meta"]) == 1
    assert "InputError: give --device NAME beside --meta" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], *([*command[:1], "nowhere.py:f", *command[1:]] for command in MODEL_COMMANDS)]
)
@pytest.mark.parametrize("missing", ["torch", "numpy", "highspy"])
def test_help_and_a_missing_file_import_nothing_heavy(arguments, missing):
    script = f"import sys; sys.modules[{missing!r}] = None; from planner.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if "--help" in arguments else 1)


@pytest.mark.parametrize(
    "arguments", [["show", "none.json"], ["explain", "none.json"], ["solve", "none.json", "--budget", "0.5"]]
)
def test_a_missing_plan_is_named_before_the_solver_is_imported(arguments):
    script = "import sys; sys.modules['numpy'] = None; from planner.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "PlanFileError: cannot read none.json" in done.stderr


def test_a_file_without_a_function_is_named_as_one(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    with pytest.raises(InputError, match=r"name the function that builds the model, too, .*mine\.py:FUNCTION"):
        Target.find(str(file))
