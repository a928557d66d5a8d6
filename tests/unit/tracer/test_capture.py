import _thread
import gc
import threading

import pytest
import torch
from torch import nn

from planner import CaptureError
from planner.profiler.memory import logical_peak
from planner.tracer.call import CallSpec, flatten_example
from planner.tracer.capture import capture, one_at_a_time, running_steps
from planner.tracer.module_stack import ModuleStack
from planner.tracer.recording import record


@pytest.fixture
def collecting():
    was = gc.isenabled()
    yield
    gc.enable() if was else gc.disable()


class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("on purpose")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Fails])
def test_garbage_is_collected_afterwards_as_before(collecting, kind, enabled):
    gc.enable() if enabled else gc.disable()
    try:
        capture(kind(2, 2), (torch.rand(3, 2),))
    except CaptureError:
        assert kind is Fails
    assert gc.isenabled() == enabled


def test_the_recording_forward_needs_no_more_memory_than_inference():
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1))]
    model, x = nn.Sequential(*layers), torch.randn(4096, 16)
    leaves, spec = flatten_example((x,), {})
    call = CallSpec(spec, (None,) * len(leaves), (0,), None)
    with torch.no_grad():
        inference = logical_peak(lambda: model(x), x.device)
    recorded = logical_peak(lambda: record(model, call, [x], (), x.device, ModuleStack(model)).restore(), x.device)
    assert recorded <= inference + 2 * x.nbytes, "it keeps activations alive"


@pytest.mark.parametrize("is_autograds", [True, False])
def test_who_waits_for_the_thread_that_plans(is_autograds):
    """On a GPU, a thread that Python has not started runs the backward of a step that the planning thread waits for."""
    done = threading.Event()

    def act() -> None:
        with one_at_a_time():
            done.set()

    with one_at_a_time(), running_steps():
        if is_autograds:
            _thread.start_new_thread(act, ())
            assert done.wait()
        else:
            threading.Thread(target=act).start()
            assert not done.wait(0.1)
    assert done.wait()
