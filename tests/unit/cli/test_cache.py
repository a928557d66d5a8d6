"""planner cache: what is on file, and away with it."""

import json
import subprocess
import sys

import pytest

from planner.cli import main
from planner.profiler.cache import KernelCache
from planner.profiler.profile import KernelCost


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path / "costs"))
    return tmp_path / "costs"


def fill(folder):
    conditions = {"device": "a device of the test", "torch": "2.13.0", "threads": 3}
    KernelCache(folder, conditions).add({"a": KernelCost(100, 0, (), 110, 20, 9), "b": KernelCost(300, 0, (), 300, 0, 9)})
    (folder / "kernels-0123.json").write_text('{"conditions": {"rule": 4}, "kernels": {"a": [1, 2]}}')  # of another release
    (folder / "kernels-4567.json").write_text("junk")


def test_info_says_where_the_file_is_and_what_it_holds(folder, capsys):
    fill(folder)
    assert main(["cache", "--info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert str(folder) in text.replace(" ", "") or folder.name in text
    assert "a device of the test" in text and "threads 3" in text and "±2.5%" in text
    assert text.count("not read") == 2
    assert main(["cache", "--info", "--json"]) == 0
    files = {tuple(file["conditions"] or ()): file for file in json.loads(capsys.readouterr().out)["files"]}
    assert len(files) == 2
    (known,) = [file for conditions, file in files.items() if conditions]
    assert known["kernels"] == 2 and known["spread"] == 0.05 and known["bytes"] > 0


def test_clear_removes_the_files_and_nothing_else(folder, capsys):
    fill(folder)
    (folder / "notes.txt").touch()
    assert main(["cache", "--clear"]) == 0
    assert "3 files removed" in capsys.readouterr().out
    assert not [*folder.glob("*.json")] and (folder / "notes.txt").exists()
    assert main(["cache", "--info"]) == 0
    assert "none" in capsys.readouterr().out
    assert main(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 0


def test_a_folder_that_cannot_be_cleared_is_an_error_in_a_line(folder, capsys, monkeypatch):
    fill(folder)
    monkeypatch.setattr("planner.profiler.cache.FileLock", refuse)
    assert main(["cache", "--clear"]) == 1
    assert "cannot be cleared: no locks here" in capsys.readouterr().err


def refuse(*args, **kwargs):
    raise NotImplementedError("no locks here")


def test_it_needs_no_torch(folder):
    code = "import sys; from planner.cli import main; main(['cache', '--info']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)
