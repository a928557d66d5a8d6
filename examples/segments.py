"""The textbook picture: a plain stack of layers checkpointed in two segments, next to a plan at the same peak.

python examples/segments.py
"""

import copy
import statistics
import time

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from planner import plan
from planner.profiler.memory import logical_peak
from planner.units import format_bytes


class Segmented(nn.Module):
    """A stack run in segments: only the segments' inputs are kept."""

    def __init__(self, stack, segments):
        super().__init__()
        self.stack, self.segments = stack, segments

    def forward(self, x):
        return checkpoint_sequential(self.stack, self.segments, x, use_reentrant=False).square().mean()


class Stack(nn.Module):
    """The same stack, plain."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x):
        return self.stack(x).square().mean()


def build(layers=24, width=256, batch=2048):
    """Return `(model, args, kwargs)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)) for _ in range(layers)))
        return Stack(stack).train(), (torch.randn(batch, width),), {}


def step(module, args):
    """One forward and backward from empty gradients."""
    module.zero_grad(set_to_none=True)
    module(*args).backward()


def peak(module, args):
    """Bytes of one step above what is resident before it."""
    step(module, args)
    module.zero_grad(set_to_none=True)
    return logical_peak(lambda: step(module, args), args[0].device)


def times(modules, args, rounds):
    """CPU seconds of a step relative to the first module's, medians of interleaved rounds."""
    spent = {name: [] for name in modules}
    for _ in range(rounds):
        for name, module in modules.items():
            start = time.process_time()
            step(module, args)
            spent[name].append(time.process_time() - start)
    first = next(iter(modules))
    return {name: statistics.median(a / b for a, b in zip(spent[name], spent[first], strict=True)) for name in modules}


def main(rounds=5, **sizes):
    """Compare plain, two segments and a plan at the segments' peak; returns {name: (peak bytes, time ratio)}."""
    model, args, _ = build(**sizes)
    resident = sum(tensor.nbytes for tensor in (*model.parameters(), *args))
    segmented = Segmented(copy.deepcopy(model).stack, 2)
    segmented_peak = peak(segmented, args)
    planned = plan(copy.deepcopy(model), resident + segmented_peak, args, progress=False)
    modules = {"plain": model, "two segments": segmented, "plan, same peak": planned}
    peaks = {name: peak(module, args) for name, module in modules.items()}
    ratios = times(modules, args, rounds)
    print(f"{'':<16} {'peak above resident':>20} {'of plain':>9} {'step time':>10}")
    for name in modules:
        print(f"{name:<16} {format_bytes(peaks[name]):>20} {peaks[name] / peaks['plain']:>9.3f} {ratios[name]:>9.3f}x")
    return {name: (peaks[name], ratios[name]) for name in modules}


if __name__ == "__main__":
    main()
