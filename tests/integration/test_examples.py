"""Examples run as tests, small."""

import importlib

import pytest
import torch

from planner import plan, verify
from planner.graph.floor import floor
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from tests.support.paths import ROOT

SMALL = {
    "gpt2": {"layers": 2, "width": 32, "length": 32, "vocabulary": 64},
    "llama": {"layers": 2, "width": 32, "length": 32, "vocabulary": 64},
    "bert": {"layers": 2, "width": 32, "length": 32, "vocabulary": 64},
    "vit": {"layers": 4, "width": 48, "heads": 4, "pixels": 64, "patch": 8, "batch": 4},
    "unet": {"pixels": 64, "width": 4},
    "resnet50": {"width": 8, "pixels": 64, "batch": 8},
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", SMALL)
def test_example_models_are_planned_exactly_and_within_budget(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    model, args, kwargs = importlib.import_module(f"examples.{name}").build(**SMALL[name])
    graph = plan(model, 1.0, args, kwargs, progress=False).plan.graph
    least, plain = floor(graph)[0], simulate(graph, keep_all(graph)).peak_bytes
    planned = plan(model, least + int(0.7 * (plain - least)), args, kwargs, progress=False)
    assert planned.plan.solution.schedule.recomputes()
    report = verify(planned, args, kwargs, rounds=1)
    assert report.exact, report
    assert report.within_budget, report
    assert abs(report.measured_peak_bytes - report.predicted_peak_bytes) <= 0.002 * report.predicted_peak_bytes + 65536


def test_segments_example_plans_no_more_than_the_segments_need(capsys):
    from examples import segments

    found = segments.main(rounds=1, layers=8, width=64, batch=256)
    assert found["plan, same peak"][0] <= found["two segments"][0] < found["plain"][0]
    assert "two segments" in capsys.readouterr().out


def run_code_of(page):
    """Run the Python blocks of a page, one after the other; the names they leave."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    return names


def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_code_of("docs/tutorial.md")
    planned, report = names["planned"].plan, names["report"]
    assert report.exact and report.within_budget and planned.budget_bytes == 7 * 2**20
    assert names["whole"].plan.peak_bytes > planned.budget_bytes, "the tutorial's model must not fit"
    assert "is below" in capsys.readouterr().out and names["step"] == 2


def test_a_training_loop_with_everything_around_it_is_the_same(tmp_path, monkeypatch):
    from examples import training_loop

    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    found = training_loop.main(steps=3, budget=0.8, **SMALL["gpt2"])
    (plain_losses, plain_state, plain_peak), (losses, state, peak) = found["plain"], found["planned"]
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(plain_state, state, strict=True))
    assert peak < plain_peak


def test_gradients_used_in_the_backward_are_freed_in_stages(tmp_path, monkeypatch):
    from examples import optimizer_in_backward

    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    found = optimizer_in_backward.main(layers=4, width=64, length=48, vocabulary=64, budget=0.9)
    weights, _ = found["plain"]
    for way, (ours, _) in found.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, ours, strict=True)), way
    assert found["planned, 16 stages"][1] < found["planned, one stage"][1]


def assert_equal_states(found):
    assert all(torch.equal(a, b) for a, b in zip(found["plain"], found["planned"], strict=True))


@pytest.mark.parametrize(
    "arguments", [{}, pytest.param({"bf16": True, "optim": "adamw_torch"}, marks=pytest.mark.zoo)], ids=["default", "bf16"]
)
def test_hugging_face_trainer_trains_planned(arguments, tmp_path, monkeypatch):
    from examples import hf_trainer

    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    sizes = {"layers": 2, "width": 32, "length": 64, "vocabulary": 64}
    weights, callback = hf_trainer.main(budget=0.8, arguments=arguments, **sizes)
    assert_equal_states(weights)
    plan_made = callback.planned.plan
    assert plan_made.measured_bytes <= plan_made.budget_bytes < 0.9 * plan_made.plain.peak_bytes
    assert callback.planned.num_planned_calls == 8


# Lightning itself: it asks torch for a name that is on its way out, and comments on the machine's cores and devices
@pytest.mark.filterwarnings(
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_planned(precision, tmp_path, monkeypatch):
    from examples import lightning_callback

    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    sizes = {"batch": 4, "pixels": 16, "width": 8, "depth": 4}
    state, callback = lightning_callback.main(budget=0.8, precision=precision, **sizes)
    assert_equal_states(state)
    plan_made = callback.planned.plan
    assert plan_made.peak_bytes <= plan_made.budget_bytes < plan_made.plain.peak_bytes
    assert plan_made.measured_bytes <= plan_made.budget_bytes
    assert callback.planned.num_planned_calls == 8
