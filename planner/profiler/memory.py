"""Bytes that a piece of code allocates on a device, by the allocator's own events."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from planner.profiler.python_events import python_events_off

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile prints two lines


def logical_peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes `run()` had allocated at once on top of what was live before.

    On CPU from the allocator's events in a profile; on CUDA from the allocator's peak statistics.
    """
    if device.type != "cuda":
        return peak_of(cpu_allocations(run))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def allocations_of(run: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """What `run()` returns, the bytes it left allocated more than before, and the most it had so at once."""
    kept: list[Any] = []
    if device.type != "cuda":
        events = cpu_allocations(lambda: kept.append(run()))
        sums = list(itertools.accumulate(nbytes for _, nbytes in events))
        return kept[0], sums[-1] if sums else 0, max([0, *sums])
    start = torch.cuda.memory_allocated(device)
    peak = start + logical_peak(lambda: kept.append(run()), device)
    return kept[0], torch.cuda.memory_allocated(device) - start, peak - start


def cpu_allocations(run: Callable[[], Any]) -> list[tuple[int, int]]:
    """The CPU allocator's (address, signed bytes) events during `run()`, in order of time."""
    events = [event for event in cpu_trace(run) if is_allocation(event)]
    events.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in events]


def cpu_trace(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The events of a profile of `run()` with the CPU allocator's own, in no order.

    The exported trace is the public place that holds them all: `events()` leaves out those inside an operator.
    """
    # acc_events changes nothing in one cycle; without it torch 2.11 warns that it would
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with python_events_off():  # of reading the trace, which takes longer than the run where something listens
        recorded.start()
    try:
        run()
    finally:
        with python_events_off():
            recorded.stop()
    with python_events_off(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return found


def is_allocation(event: Mapping[str, Any]) -> bool:
    """Whether an event of a trace is the CPU allocator's: `args` then hold `Addr` and `Bytes`, negative where it frees."""
    return bool(event["name"] == "[memory]" and event["args"]["Device Type"] == 0)


def peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """The highest running sum; freeing an address that was allocated before the first event counts nothing."""
    live: dict[int, int] = {}
    total = peak = 0
    for address, nbytes in allocations:
        if nbytes > 0:
            live[address] = nbytes
            total += nbytes
            peak = max(peak, total)
        else:
            total -= live.pop(address, 0)
    return peak
