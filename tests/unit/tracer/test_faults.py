"""What is no property of the model never makes a submodule opaque: the planner's own faults, and lack of memory."""

from __future__ import annotations

import logging
import types

import numpy as np
import pytest
import torch
from torch import nn

from planner import CaptureError, InputError, max_batch, plan, plan_units
from planner.errors import GraphError, ScheduleError
from planner.tracer.faults import concerns_model, is_fault, is_out_of_memory, noting
from tests.support.models import Block, Ragged, Wrapped, rows_of_data

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def planned(act=lambda x: x, **options):
    return plan(Wrapped(nn.Sequential(nn.Linear(4, 4), Block(act))), 1.0, (X,), costs="estimate", progress=False, **options)


def raising(error):
    def act(x):
        raise error

    return act


FAULTS = {
    "in the trace": ("planner.tracer.trace_mode.source_here", TypeError),
    "in the recording forward": ("planner.tracer.host.kernels.storage_id", TypeError),
    "in the traced call": ("planner.tracer.trace.flatten_output", TypeError),
    "in the normal form": ("planner.tracer.capture.normalize", TypeError),
    "in a missing attribute": ("planner.tracer.trace_mode.torch", AttributeError),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_planner_is_raised_and_makes_nothing_opaque(name, monkeypatch, caplog):
    place, kind = FAULTS[name]
    monkeypatch.setattr(place, types.SimpleNamespace() if kind is AttributeError else None)
    with caplog.at_level(logging.INFO, "planner"), pytest.raises(kind) as caught:
        planned()
    assert type(caught.value) is kind
    assert any("Wrapped" in note and "please report" in note for note in caught.value.__notes__)
    assert not [record for record in caplog.records if "opaque" in record.message]


def test_a_fault_while_an_opaque_submodule_is_recorded_is_raised(monkeypatch):
    monkeypatch.setattr("planner.tracer.opaque.record.find_reads", None)
    with pytest.raises(TypeError, match="not callable") as caught:
        planned(rows_of_data)
    assert "please report" in caught.value.__notes__[0]


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.OutOfMemoryError("no words"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("traced", [False, True])
def test_lack_of_memory_is_raised_and_makes_nothing_opaque(error, traced, caplog):
    def act(x):
        if traced and type(x) is torch.Tensor:
            return x  # a recording forward
        raise error

    with caplog.at_level(logging.INFO, "planner"), pytest.raises(type(error)) as caught:
        planned(act)
    assert caught.value is error
    assert "capturing Wrapped" in "".join(error.__notes__) and "more memory than is free" in "".join(error.__notes__)
    assert not [record for record in caplog.records if "opaque" in record.message]
    del error.__notes__


def test_ctrl_c_is_raised():
    with pytest.raises(KeyboardInterrupt):
        planned(raising(KeyboardInterrupt()))


def test_an_untraceable_submodule_still_becomes_opaque_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "planner"):
        module = planned(rows_of_data)
    assert module.plan.provenance.opaque == ("body.1",)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("planner.tracer", "WARNING")
    assert "body.1" in record.message and "shape depends on the data" in record.message


class Holder:
    """An object of the user's, whose class the recording forward patches."""

    size = property(lambda self: 3)


HOLDER = Holder()


def missing(x):
    return x * HOLDER.missing


def unwritable(x):
    HOLDER.size = 4
    return x


def misused(x):
    np.random.seed(-1)
    return x


def used_up(x):
    return x * {"a": 1}["b"]


@pytest.mark.parametrize("act", [missing, unwritable, misused, used_up])
def test_an_error_of_the_models_own_is_the_models_where_the_planner_stands_between(act):
    with pytest.raises(CaptureError, match=r"raises (AttributeError|ValueError|KeyError)"):
        planned(act)


def test_a_criterion_that_takes_other_arguments_is_the_users():
    with pytest.raises(CaptureError, match="raises TypeError"):
        plan(nn.Linear(4, 4), 1.0, (X,), criterion=lambda out: out.sum(), criterion_args=(X,), progress=False)


def test_a_loss_that_takes_other_arguments_is_the_users_and_its_lack_of_memory_is_none():
    with pytest.raises(InputError, match="cannot be applied to the model's output"):
        planned(loss=lambda: 0)
    with pytest.raises(torch.OutOfMemoryError):
        planned(loss=raising(torch.OutOfMemoryError("no words")))


def test_make_inputs_may_run_out_of_memory():
    with pytest.raises(MemoryError):
        max_batch(raising(MemoryError()), nn.Linear(4, 4), "1GiB", progress=False)
    with pytest.raises(InputError, match="raises TypeError"):
        max_batch(lambda: None, nn.Linear(4, 4), "1GiB", progress=False)


@pytest.mark.parametrize("kind", [GraphError, ScheduleError])
def test_plan_units_raises_what_the_planner_got_wrong(kind, monkeypatch):
    monkeypatch.setattr("planner.profiled.lower", lambda *_, **__: raising(kind("value a is written twice"))(None))
    with pytest.raises(kind) as caught:
        plan_units(Ragged(), 1.0, (X,), costs="estimate", progress=False)
    assert "lowering" in caught.value.__notes__[0] and "please report" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1, "of the innermost place"


@pytest.mark.parametrize("error", MEMORY[1:3], ids=lambda error: type(error).__name__)
def test_plan_units_raises_lack_of_memory(error, caplog):
    runs = []

    def act(x):
        runs.append(x)
        if len(runs) > 2:  # after the step that looks and the one that records arguments: a capture
            raise error
        return x

    with caplog.at_level(logging.INFO, "planner"), pytest.raises(type(error)):
        plan_units(Ragged(act), 1.0, (X,), costs="estimate", progress=False)
    assert not [record for record in caplog.records if "left as it is" in record.message]


def test_errors_are_told_apart():
    def of(error):
        try:
            raise error
        except type(error) as caught:
            return caught

    assert is_fault(of(GraphError("a"))) and not is_fault(of(CaptureError("a"))) and not is_fault(of(InputError("a")))
    assert not is_fault(of(KeyError("raised here, which is not the planner's code")))
    assert concerns_model(of(RuntimeError("Expected all tensors to be on the same device")))
    assert not any(concerns_model(of(error)) for error in MEMORY)
    assert not is_out_of_memory(of(ValueError("out of memory"))), "not torch's"


def test_a_note_is_added_to_what_does_not_concern_the_model_alone():
    for error, num_notes in ((CaptureError("a"), 0), (GraphError("a"), 1), (MemoryError(), 1)):
        with pytest.raises(type(error)) as caught, noting("testing"), noting("testing this"):
            raise error
        assert len(getattr(caught.value, "__notes__", ())) == num_notes
