"""The comparison with what people use: every method through the same code, small; what changes results shows."""

import json
import math
from argparse import Namespace
from copy import deepcopy

import pytest
import torch

from benchmarks import cases, compare
from benchmarks.comparison import tables
from benchmarks.rivals import RIVALS, NotApplicable, sequences

SMALL = {
    "gpt2": {"layers": 4, "width": 32, "length": 32, "vocabulary": 64},
    "resnet50": {"layers": (1, 1, 1, 1), "width": 8, "pixels": 64, "batch": 2, "classes": 5},
    "unet": {"layers": 2, "width": 8, "pixels": 32, "batch": 1},
}


@pytest.fixture(autouse=True)
def threads():
    """A case sets one thread, for its own process; later tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sides(name, *methods):
    """The sides of methods of rivals, compared with eager's results."""
    model, args, kwargs = cases.build(name, **SMALL[name])
    found = [compare.Side(deepcopy(model), args, kwargs, RIVALS[method]) for method in ("eager", *methods)]
    for side in found:
        side.compare(found[0])
    return [side.record for side in found]


def test_checkpointing_of_blocks_changes_no_bit_and_saves_memory():
    methods = ("transformers", "blocks", "half-blocks", "sqrt-segments", "selective")
    eager, *rivals = sides("gpt2", *methods)
    for method, rival in zip(methods, rivals, strict=True):
        assert rival["difference"] == {"loss": 0.0, "gradients": 0.0, "buffers": 0.0}, method
        assert rival["logical_bytes"] < eager["logical_bytes"], method
    whole, blocks, half, _, selective = (rival["logical_bytes"] for rival in rivals)
    assert abs(whole - blocks) < 0.01 * blocks
    assert blocks < half < eager["logical_bytes"]
    assert blocks < selective


def test_a_recompute_that_updates_running_statistics_twice_shows_in_the_buffers():
    _, rival = sides("resnet50", "blocks")
    assert rival["difference"]["gradients"] == 0.0
    assert rival["difference"]["buffers"] > 0.01


def test_what_torch_compile_draws_and_returns_is_compared():
    eager, rival = sides("unet", "aot_eager-0.5")
    torch.compiler.reset()
    assert rival["difference"]["loss"] < 1e-4
    assert rival["logical_bytes"] < eager["logical_bytes"]


def test_where_a_method_does_not_apply_it_says_why(monkeypatch):
    model, _, _ = cases.build("unet", **SMALL["unet"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    for method, why in (
        ("transformers", "transformers"),
        ("sqrt-segments", "2 sequences"),
        ("inductor-0.5", "no-such-compiler"),
    ):
        with pytest.raises(NotApplicable, match=why):
            RIVALS[method](model)


@pytest.mark.parametrize(("name", "counts"), [("gpt2", [4]), ("resnet50", [4]), ("unet", [2, 2])])
def test_blocks_are_found(name, counts):
    model, _, _ = cases.build(name, **SMALL[name])
    assert [len(blocks) for blocks in sequences(model)] == counts


def test_scale_multiplies_the_batch():
    for scale, batch in ((1.0, 2), (3.0, 6), (0.5, 1)):
        assert len(cases.build("gpt2", scale, **SMALL["gpt2"])[2]["input_ids"]) == batch


def test_difference_is_a_share_of_the_largest_entry():
    a = {"x": torch.tensor([1.0, -4.0]), "none": None, "count": torch.tensor(2)}
    assert compare.difference(a, a) == 0.0
    assert compare.difference(a, {**a, "x": torch.tensor([1.0, -3.0])}) == 0.25
    assert compare.difference(a, {**a, "count": torch.tensor(3)}) == 0.25
    assert compare.difference(a, {**a, "x": torch.tensor([math.nan, -4.0])}) == math.inf
    assert compare.difference(a, {**a, "x": None}) == math.inf


def without_dropout(model):
    """A rival that saves memory by computing something else."""
    return model.eval()


def test_a_case_with_a_rival_that_changes_results(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    monkeypatch.setitem(RIVALS, "transformers", without_dropout)
    monkeypatch.setattr(compare, "physical_peak", compare.logical_peak)  # this process has not the allocator's settings
    sizes = SMALL["gpt2"] | {"layers": 2}
    pickled = tmp_path / "planned.pickle"
    record = compare.measure_case("gpt2", "transformers", 2, pickled, **sizes)
    rival, ours = record["rival"], record["ours"]
    assert rival["difference"]["gradients"] > 0.01
    assert ours["difference"] == {"loss": 0.0, "gradients": 0.0, "buffers": 0.0}
    assert ours["logical_bytes"] <= rival["logical_bytes"] < record["eager"]["logical_bytes"]
    assert 0.9 * ours["predicted_bytes"] <= ours["logical_bytes"] <= ours["predicted_bytes"]
    assert compare.measure_physical("gpt2", "transformers", pickled, **sizes) == {
        side: record[side]["logical_bytes"] for side in ("eager", "ours", "rival")
    }
    text = tables([{"model": "gpt2", "method": "transformers", "scale": 1.0, **record}])
    row = next(line for line in text.splitlines() if line.startswith("| gpt2 | transformers |")).split(" | ")
    assert f"gradients {rival['difference']['gradients']:.0e}" in row[7]
    assert row[11] == "none"
    assert "| gpt2 | 1 |" in text and "| all | 1 |" in text


def options(out):
    return Namespace(models=["unet"], methods=["transformers"], scale=1.0, rounds=2, sizes=SMALL["unet"], out=out)


def test_a_case_that_fails_is_recorded_and_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "records.jsonl"
    with monkeypatch.context() as changed:
        changed.setattr(compare, "LIMIT_S", 0.01)
        compare.run_all(options(out))
    assert "not done after 0.01 s" in compare.read([out])[0]["error"]
    for _ in range(2):  # the second finds it done
        compare.run_all(options(out))
    assert [("error" in json.loads(line)) for line in out.read_text().splitlines()] == [True, False]
    (record,) = compare.read([out])
    assert record["not_applicable"] == "no model of transformers"
    assert "- unet, transformers: no model of transformers" in tables([record])
    assert "unet transformers: not done after" in capsys.readouterr().out


def test_an_error_is_told_in_one_line():
    case = Namespace(case=("unet", "eager", "planned.pickle"), physical=False, rounds=2, scale=1.0, sizes={"nonsense": 1})
    with pytest.raises(SystemExit, match=r"TypeError: .*nonsense"):
        compare.run_here(case)


def test_a_plan_below_the_floor_is_told_in_its_row():
    times = {"time": {"median": 1.0, "noise": 0.0}}
    record = {
        "model": "unet",
        "method": "ours-0.3",
        "scale": 1.0,
        "machine": cases.machine(),
        "eager": {"logical_bytes": 100, "physical_bytes": 100, **times},
        "ours": {"budget_bytes": 30, "error": "InfeasibleBudgetError: budget 30 B is below 40 B"},
        "control": times["time"],
    }
    assert "| unet | 0.3 | InfeasibleBudgetError |" in tables([record])
