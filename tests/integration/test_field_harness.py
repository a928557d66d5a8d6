"""The benchmark of public packages sees each kind of fault; what it declares is complete. No package is needed."""

from __future__ import annotations

import random
import re
import tomllib
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.field.__main__ import selected
from benchmarks.field.case import PRECISIONS, Setup, call, load
from benchmarks.field.models import HOMES
from benchmarks.field.outcome import Outcome
from benchmarks.field.peak import resident_bytes, step_peak
from benchmarks.field.runner import append, read, run
from benchmarks.field.state import differences, flat
from benchmarks.field.table import exact_share, table
from planner import plan
from tests.support.paths import ROOT

FAULTY = load(("tests.support.faulty_field",))
EXPECTED = {
    "exact": ("exact", ""),
    "different_parameter": ("different", r"step 1: parameter 0\.weight \(by \S+ of"),
    "different_attribute": ("different", r"step 1: attribute history\['seen'\]\(len\) \(2 in eager, 3\)"),
    "different_generator": ("different", "step 1: Python's generator"),
    "raises": ("crashed", r"step 1: KeyError: 'made up' \[support/faulty_field\.py:\d+\]"),
    "aborts": ("crashed", r"ended with SIGABRT, while training\. .*faulty_field\.py"),
    "hangs": ("crashed", "no end within 5 s"),
    "refused": ("refused", "InputError: costs='made up' is not known"),
    "in_units": ("in units", "CaptureError: .*calls"),
    "unplanned": ("unplanned", r"step 1: .* runs unplanned: .*\[65, 8\]"),
    "eager_raises": ("broken", "eager: RuntimeError: mat1 and mat2"),
    "eager_varies": ("broken", "eager differs from itself: step 0: "),
}


def test_each_fault_is_seen():
    """In one test, so that one process imports torch and plans for all of them."""
    limits = {False: 120.0, True: 5.0}
    outcomes: dict[str, Outcome] = {}
    for hangs, limit_s in limits.items():
        rows = [(case, "fp32") for case in FAULTY.values() if case.name.endswith("/hangs") == hangs]
        outcomes |= {outcome.case.partition("/")[2]: outcome for outcome in run(rows, limit_s)}
    assert outcomes.keys() == EXPECTED.keys()
    for name, (verdict, reason) in EXPECTED.items():
        assert outcomes[name].outcome == verdict, outcomes[name]
        assert re.search(reason, outcomes[name].reason), outcomes[name]
    exact = outcomes["exact"]
    assert exact.planned_steps == exact.steps == 3
    assert 0 < exact.peak_bytes <= exact.budget_bytes < exact.plain_bytes
    assert outcomes["unplanned"].planned_steps == 2
    units = outcomes["in_units"]
    assert units.units >= 1 and units.planned_steps == 3
    assert 0 < units.peak_bytes <= units.budget_bytes <= units.plain_bytes


def test_the_table_counts_steps_and_names_reasons(tmp_path):
    rows = [
        Outcome("torch/exact", "fp32", "exact", steps=3, planned_steps=3),
        Outcome("torch/unplanned", "fp32", "unplanned", "step 1: input 0", steps=3, planned_steps=2),
        Outcome("torch/refused", "fp32", "refused", "InputError: costs='made up'"),
        Outcome("torch/different", "fp32", "different", "step 0: loss", steps=3, planned_steps=3),
        Outcome("torch/broken", "fp32", "broken", "eager: ValueError"),
    ]
    for row in rows:
        append(tmp_path / "records.jsonl", row)
    assert list(read(tmp_path / "records.jsonl").values()) == rows
    assert exact_share(rows) == pytest.approx((1 + 2 / 3) / 4)
    text = table(rows, "today", "command")
    assert "1 exact, 1 unplanned, 1 refused, 1 different, 1 broken" in text
    assert "| torch/refused | fp32 | refused | InputError: costs='made up'" in text


def test_a_broken_row_is_no_excuse():
    broken, exact = Outcome("a", "fp32", "broken"), Outcome("b", "fp32", "exact", steps=3, planned_steps=3)
    assert exact_share([broken, exact]) == 1.0
    assert exact_share([broken]) == 0.0


class Settings:
    """An object that holds a value some way down."""

    def __init__(self, value):
        self.value = {"a": deque([(value,)])}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (None, torch.zeros(1)),
        ({1}, {2}),
        ([1], (1,)),
        (torch.zeros(1), torch.zeros(1, requires_grad=True)),
        (torch.zeros(1), -torch.zeros(1)),
        (torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
        (random.Random(1), random.Random(2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (np.zeros(1), np.zeros(1, np.float32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_attribute_is_compared_by_type_and_value_at_any_depth(one, other):
    assert differences(flat("x", Settings(one)), flat("x", Settings(one))) == []
    assert differences(flat("x", Settings(one)), flat("x", Settings(other)))


def test_what_is_no_number_is_the_same():
    for value in (float("nan"), torch.tensor(float("nan"))):
        assert differences(flat("x", value), flat("x", value)) == []


@pytest.mark.parametrize("loss", [lambda out: out.square().mean(), lambda out: out.t().square().contiguous().mean()])
def test_the_measured_peak_is_near_the_predicted_one(loss):
    """The loss's own memory is not the plan's; its gradient is."""
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    setup = Setup(model, (call(torch.randn(256, 16)),), lambda module, out, target: loss(out))
    planned = plan(model, 0.8, setup.batches[0].args, progress=False)
    measured = resident_bytes(planned) + step_peak(setup, planned, "fp32")
    gradient = 256 * 16 * 4  # of the output: the plan counts it to the end of the backward, autograd drops it earlier
    assert planned.plan.peak_bytes - gradient <= measured <= planned.plan.peak_bytes


def test_sixty_models_of_fifteen_packages_and_every_package_is_pinned():
    cases = load(HOMES)
    assert len(cases) >= 60
    assert len({case.requirement for case in cases.values()}) >= 15
    assert sum(len(case.precisions) == len(PRECISIONS) for case in cases.values()) >= 60
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {requirement.partition("==")[0] for requirement in extras["field"] if "==" in requirement}
    assert len(pinned) == len(extras["field"])
    assert {case.requirement for case in cases.values()} == pinned


def test_a_package_a_model_or_the_start_of_a_name_selects():
    cases = load(HOMES)
    assert set(selected(cases, ["timm"])) == {name for name in cases if name.startswith("timm/")}
    assert list(selected(cases, ["diffusers/unet_2d"])) == ["diffusers/unet_2d"]
