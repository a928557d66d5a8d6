"""Measure the memory and the time of a step: logical peak, physical peak, paired CPU time.

Each peak is counted above what was live when `fn` was called. Call `fn` once before measuring it: a first call
also allocates what stays (oneDNN caches, library pages, optimizer state).
"""

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from planner.profiler.memory import logical_peak as allocator_peak

MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Step = Callable[[], Any]


class Ratio(NamedTuple):
    """How much CPU time `a` takes relative to `b`, and the same for `b` against itself."""

    median: float
    control: float
    noise: float  # half the interquartile range of the control
    seconds: float  # one call of b


def logical_peak(fn: Step, device: str | torch.device = "cpu") -> int:
    """Return the most bytes that `fn` has allocated at once on top of what was live before."""
    return allocator_peak(fn, torch.device(device))


def physical_peak(fn: Step) -> int:
    """Return the most resident memory that `fn` adds to this process, by the kernel's own high-water mark (Linux)."""
    for name, value in MALLOC_ENVIRONMENT.items():
        if os.environ.get(name) != value:
            raise RuntimeError(
                f"physical_peak: {name} is {os.environ.get(name)!r}; it must be {value!r} before the process starts, or "
                f"freed chunks stay in the heap and count as live. Start it as: {_shell(MALLOC_ENVIRONMENT)} python ..."
            )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    start = _high_water_bytes()
    fn()
    return _high_water_bytes() - start


def _high_water_bytes() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def _shell(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


def paired_cpu_ratio(a: Step, b: Step, rounds: int = 7) -> Ratio:
    """Return the CPU time of `a` relative to `b`, as the median of paired ratios; b against b shows how far to trust it."""
    spent, first, second = interleaved_cpu_seconds((a, b, b), rounds)
    ratios = [2 * own / (b1 + b2) for own, b1, b2 in zip(spent, first, second, strict=True)]
    controls = [b1 / b2 for b1, b2 in zip(first, second, strict=True)]
    return Ratio(statistics.median(ratios), *middle(controls), statistics.median([*first, *second]))


def interleaved_cpu_seconds(steps: Sequence[Step], rounds: int) -> list[list[float]]:
    """Return the CPU seconds of each step in each round, as [step][round]: in one thread, in rotating order."""
    spent = [[0.0] * rounds for _ in steps]
    with one_thread():
        for turn in range(rounds):
            for slot in range(len(steps)):
                which = (slot + turn) % len(steps)
                spent[which][turn] = cpu_seconds(steps[which])
    return spent


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and half the interquartile range; of two values at least."""
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2


def cpu_seconds(fn: Step) -> float:
    """Return the CPU time this process spends in one call, all its threads together."""
    start = time.process_time()
    fn()
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operators in one thread, then restore the number it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
