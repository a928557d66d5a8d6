"""The script for a GPU machine runs, tried on a CPU with tiny models: what it cannot do here must not break there."""

import json

import pytest

from benchmarks import gpu
from tests.support import world


@pytest.fixture(autouse=True)
def _switches_kept():
    """The script turns deterministic kernels on for its whole process."""
    with world.kept():
        yield


@pytest.mark.zoo
def test_every_case_of_a_model_is_measured_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "METHODS", ("transformers", "blocks"))
    monkeypatch.setattr(gpu, "SLOW_METHODS", ("selective",))
    monkeypatch.setattr(gpu, "SHARES", (0.7, 0.01))
    out = tmp_path / "gpu.jsonl"
    gpu.run(["gpt2-medium"], out, limit_s=600, rounds=1, small=True)
    records = {record["case"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert list(records) == [
        "eager",
        "prepare",
        "plan 0.7",
        "plan 0.01",
        "transformers",
        "blocks",
        "largest batch",
        "selective",
    ]
    planned, eager = records["plan 0.7"], records["eager"]
    assert planned["different"] == [] and planned["time_ratio"] > 0
    assert planned["allocated_bytes"] <= planned["budget_bytes"] < eager["allocated_bytes"]
    assert abs(planned["allocated_bytes"] - planned["predicted_bytes"]) <= 64, "a scalar or two"
    assert records["plan 0.01"]["error"].startswith("InfeasibleBudgetError")
    assert records["transformers"]["different"] == []
    assert records["largest batch"]["summary"]["batch"] >= 1


def test_no_case_starts_when_the_time_is_over(tmp_path):
    out = tmp_path / "gpu.jsonl"
    gpu.run(["gpt2-medium"], out, limit_s=0, rounds=1, small=True)
    assert not out.exists()
