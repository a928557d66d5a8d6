"""A plan whose step is measured: on a copy that leaves the model alone, and planned for less where it needs more."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from planner import CheckpointedModule, MeasuredPeakError, NoScheduleFoundError, plan
from planner.graph.provenance import Provenance
from planner.verification.measured import measured_within, step_peak, time_steps
from planner.verification.step_copy import copy_of
from tests.support.planned import planned_attention, within_of
from tests.support.training import assert_same


def test_a_measured_step_changes_nothing_that_hangs_on_the_parameters():
    model, planned, args, kwargs = planned_attention()
    fired = []
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        parameter.register_post_accumulate_grad_hook(fired.append)  # an optimizer within the backward hangs here
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ran = time_steps(planned, args, kwargs, rounds=2)
    assert len(ran.seconds) == 2 and min(ran.seconds) > 0 and ran.peak_bytes == step_peak(planned, args, kwargs)
    assert 0 < ran.peak_bytes <= planned.plan.peak_bytes
    assert not fired and torch.equal(torch.get_rng_state(), rng)
    assert_same(list(before.values()), list(model.state_dict().values()))
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The peak strays as that of CUDA's allocator does."""
    monkeypatch.setattr("planner.verification.measured.may_exceed", lambda planned: True)


def test_as_much_again_as_half_of_what_it_strays_is_left_free(monkeypatch, as_on_cuda):
    _, planned, args, kwargs = planned_attention()
    peak, asked = planned.plan.peak_bytes, []
    monkeypatch.setattr("planner.verification.measured.step_peak", lambda *_: peak + 200)
    measured_within(peak + 300, within_of(planned, asked), args, kwargs)
    assert asked == [peak + 300]
    asked.clear()
    found = measured_within(peak + 299, within_of(planned, asked), args, kwargs)
    assert asked == [peak + 299, peak - 1, peak - 1] and found is not planned, "and in the end what fits is taken"


def test_what_fits_is_taken_where_there_is_no_plan_with_room_to_spare(monkeypatch):
    _, planned, args, kwargs = planned_attention()
    peak = planned.plan.peak_bytes
    monkeypatch.setattr("planner.verification.measured.step_peak", lambda *_: peak + 200)

    def within(aim_bytes):
        if aim_bytes < peak:
            raise NoScheduleFoundError("none for less")
        return planned

    assert measured_within(peak + 250, within, args, kwargs) is planned


@pytest.mark.parametrize("costs, remedy", [("measured", "expandable_segments:True"), ("estimated", "costs='measure'")])
def test_a_step_that_cannot_keep_the_budget_is_refused_with_what_would_do(monkeypatch, costs, remedy, as_on_cuda):
    _, planned, args, kwargs = planned_attention()
    made = replace(planned.plan, provenance=Provenance(costs, "a device"))
    told = CheckpointedModule(planned.original, planned.step, made, True)
    monkeypatch.setattr("planner.verification.measured.step_peak", lambda *_: 2**20)
    with pytest.raises(MeasuredPeakError, match=remedy) as caught:
        measured_within(2**20 - 1, lambda _: told, args, kwargs)
    assert (caught.value.budget_bytes, caught.value.peak_bytes) == (2**20 - 1, 2**20)


def test_on_a_cpu_nothing_is_left_free_beyond_what_it_strays(monkeypatch):
    _, planned, args, kwargs = planned_attention()
    peak, asked = planned.plan.peak_bytes, []
    monkeypatch.setattr("planner.verification.measured.step_peak", lambda *_: peak + 200)
    found = measured_within(peak + 200, within_of(planned, asked), args, kwargs)
    assert asked == [peak + 200] and found.plan.measured_bytes == peak + 200 and found.plan.check == "run"


def test_a_model_that_cannot_be_copied_is_planned_unmeasured(monkeypatch):
    class Locked(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.lock = threading.Lock()

    model, x = Locked(), torch.ones(2, 4)
    planned = plan(model, 1.0, (x,), costs="estimate", progress=False)
    assert planned.plan.check == "run", "a forked child needs no copy"
    monkeypatch.setattr("planner.verification.measured.run_step", lambda planned, call: copy_of(planned))
    with pytest.warns(UserWarning, match="was not measured: the model cannot be copied"):
        assert measured_within(1, lambda _: planned, (x,)) is planned
    assert planned.plan.check.startswith("not run: the model cannot be copied") and planned.plan.measured_bytes is None
