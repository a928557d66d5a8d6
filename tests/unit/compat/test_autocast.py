"""CUDA's autocast on a CPU's fake tensors: what is cast to which dtype, in this thread alone, and nothing stays behind."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planner._compat.autocast import as_on_cuda
from planner.tracer.capture import capture
from planner.tracer.casts import TO_COPY
from planner.tracer.target_device import TargetDevice

BF16, FP32 = torch.bfloat16, torch.float32


class Computes(nn.Linear):
    """A linear layer, then what a function makes of its result."""

    def __init__(self, function):
        super().__init__(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(super().forward(x))


def dtypes(function):
    """(kernel, dtype of its first tensor) of each kernel that the forward runs."""
    there = TargetDevice("there", (9, 0), BF16)
    joint = capture(Computes(function), (torch.randn(4, 8),), target=there)
    nodes = [node for node in list(joint.graph.nodes)[: joint.num_forward_nodes] if node.op == "call_function"]
    values = [(str(node.target), node.meta["val"]) for node in nodes]
    return {name.removeprefix("aten.").partition(".")[0]: v.dtype for name, v in values if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(
    ("function", "kernel", "dtype"),
    [
        (lambda y: y @ y.T, "mm", BF16),
        (torch.relu, "relu", BF16),
        (lambda y: y**3, "pow", FP32),  # in CUDA's list alone
        (torch.exp, "exp", FP32),
        (lambda y: F.softmax(y, 1), "_softmax", FP32),
        (lambda y: y.sum(1), "sum", FP32),
        (lambda y: torch.cat([y, y.float()]), "cat", FP32),
        (lambda y: torch.fft.fft(y.float()).real.to(BF16), "_fft_r2c", torch.complex64),  # in the CPU's list alone
    ],
)
def test_kernels_run_in_the_dtype_that_cuda_chooses(function, kernel, dtype):
    found = dtypes(function)
    assert found["addmm"] is BF16 and found[kernel] is dtype


def test_nothing_is_left_behind_and_another_thread_is_not_concerned():
    x, seen = torch.randn(4, 4), []

    def trains():
        with torch.autocast("cpu", BF16):
            seen.append((torch.mm(x, x).dtype, torch.exp(x.to(BF16)).dtype))

    trains()
    with as_on_cuda(BF16, TO_COPY):
        thread = threading.Thread(target=trains)
        thread.start()
        thread.join()
        assert torch.exp(x.to(BF16)).dtype is FP32
    trains()
    assert seen == [(BF16, BF16)] * 3
