"""doctor: what is captured, opaque, carried, guarded, read by Python and never recomputed; what prevents planning."""

import json
import os

import pytest
import torch
from torch import nn

from planner import GraphError, InputError, diagnosis, doctor

X = torch.randn(4, 8)


class Everything(nn.Module):
    """An LSTM, batch norm, a value that Python reads, a setting, and state that is carried from call to call."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.lstm = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LSTM(8, 8)
        self.scale, self.memory = 2.0, torch.zeros(4, 8)

    def forward(self, x):
        hidden = self.norm(self.body(x)) * self.scale + self.memory
        self.memory = hidden.detach()
        if (x.sum() > 1e6).item():
            hidden = hidden * 2
        return self.lstm(hidden)[0].sum()


def test_a_model_with_everything():
    found = doctor(Everything(), (X,), progress=False)
    assert found.plannable and found.problems == () and found.model == "Everything" and found.device == "cpu"
    assert 0 < found.num_forward_ops < found.num_ops and found.peak_bytes > 0 and found.starts == ("the output",)
    (opaque,) = found.opaque
    assert (opaque.module, opaque.kind, opaque.repeatable) == ("lstm", "LSTM", True) and "fused kernel" in opaque.why
    assert {"memory", "buffer norm.running_mean"} <= set(found.carried) and "memory" in found.left
    assert "scale" in found.settings and not {"forward", "body"} & set(found.settings)
    (read,) = found.reads
    assert read.value == "False" and "test_diagnosis.py:" in read.where
    assert any(once.why == "writes into a tensor that lives on" and once.count for once in found.once)
    assert (found.captures_differ, found.calls_differ, found.calls_not_run) == ("", (), "")
    assert len(found.warnings) == 2
    json.dumps(found.json())
    text = str(found)
    for part in ("Everything can be planned", "lstm", "fused kernel", "test_diagnosis.py:", "never recomputed", "same bits"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plain_model_has_nothing_to_say():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = doctor(model, (X,), progress=False)
    assert found.plannable and (found.opaque, found.reads, found.carried, found.once, found.warnings) == ((),) * 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class RowsByValue(nn.Linear):
    def forward(self, x):
        return super().forward(x[x[:, 0] > 0])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (RowsByValue(8, 1), "CaptureError: aten.nonzero.default at test_diagnosis.py:"),
        (nn.Linear(8, 1).eval(), "InputError: call model.train() first"),
        (nn.Linear(8, 1).requires_grad_(False), "InputError: call requires_grad_() on the parameters"),
    ],
)
def test_what_prevents_planning_is_a_problem_and_no_exception(model, problem):
    found = doctor(model, (X,), progress=False)
    assert not found.plannable and found.problems[0].startswith(problem)
    assert "CANNOT be planned" in str(found)


class Noisy(nn.Linear):
    """Draws from the system."""

    def forward(self, x):
        noise = torch.frombuffer(bytearray(os.urandom(4 * x.numel())), dtype=torch.int32).view(x.shape)
        return super().forward(x) + noise.to(x.dtype).sum() * 0.5


def test_steps_that_differ_are_told():
    found = doctor(Noisy(8, 1), (X,), progress=False)
    assert found.plannable and found.calls_differ == ("output 0",)
    assert "cannot be compared" in found.warnings[0] and "DIFFER in output 0" in str(found)


def test_captures_that_differ_prevent_planning(monkeypatch):
    capture, others = diagnosis.captured, iter([nn.Linear(8, 1), nn.Linear(8, 1, bias=False)])
    monkeypatch.setattr(diagnosis, "captured", lambda model, *rest: capture(next(others), *rest))
    found = doctor(nn.Linear(8, 1), (X,), progress=False)
    assert not found.plannable and "two captures of the same call differ" in found.problems[0] and found.captures_differ


def test_wrong_types_are_errors():
    with pytest.raises(InputError, match="args is a dict"):
        doctor(nn.Linear(8, 1), {"input": X})
    with pytest.raises(TypeError, match="unexpected keyword argument 'effort'"):
        doctor(nn.Linear(8, 1), (X,), effort=1)


def test_a_device_that_is_not_here():
    found = doctor(nn.Linear(8, 1), (X,), device="H100", progress=False)
    assert found.plannable and found.device == "H100-80GB" and found.calls_not_run == "the device is not here"


def broken(*args, **kwargs):
    raise GraphError("wrong by the planner")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("planner.diagnosis.captured", GraphError),
        ("planner.verification.two_calls.step_digest", RuntimeError),  # in the child
    ],
)
def test_a_fault_of_the_planner_is_no_answer(monkeypatch, name, kind):
    monkeypatch.setattr(name, broken)
    with pytest.raises(kind, match="wrong by the planner"):
        doctor(nn.Linear(8, 1), (X,), progress=False)


def test_a_fault_in_the_second_capture_is_no_answer(monkeypatch):
    captures = iter([diagnosis.captured, broken])
    monkeypatch.setattr(diagnosis, "captured", lambda *args: next(captures)(*args))
    with pytest.raises(GraphError):
        doctor(nn.Linear(8, 1), (X,), progress=False)


def test_lack_of_memory_for_two_steps_is_a_reason_not_to_run_them(monkeypatch):
    monkeypatch.setattr("planner.verification.two_calls.free_bytes", lambda: 0)
    assert "0 B are free" in doctor(nn.Linear(8, 1), (X,), progress=False).calls_not_run
