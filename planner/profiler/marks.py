"""Bytes that are live where the units of a step begin and end, and the most between these places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import record_function

from planner.graph.outer import MeasuredSection, UnitCall
from planner.profiler.memory import cpu_trace, is_allocation

Mark = Callable[[UnitCall, bool], AbstractContextManager[Any]]
"""`mark(call, is_forward)`: while its context is entered, this call's forward or backward runs."""
_Place = tuple[UnitCall | None, bool]
"""(call, is its forward)."""
_OUTSIDE: _Place = (None, False)
"""Outside of all units."""


def marked_sections(run: Callable[[Mark], Any], device: torch.device) -> list[MeasuredSection]:
    """What lies between two boundaries of marked places of `run(mark)`, in order of time, each of the innermost place.

    By the allocator's own events on a CPU, by its statistics on CUDA. Bytes are above what was allocated at the beginning.
    """
    return _of_cpu(run) if device.type != "cuda" else _of_cuda(run, device)


def _of_cpu(run: Callable[[Mark], Any]) -> list[MeasuredSection]:
    places: dict[str, _Place] = {}

    def mark(call: UnitCall, is_forward: bool) -> AbstractContextManager[Any]:
        event = f"checkpoint_planner, place {len(places)}"
        places[event] = call, is_forward
        return record_function(event)

    events: list[tuple[float, _Place | None, int, int]] = []  # time, place (None: its end), address, bytes
    for event in cpu_trace(lambda: run(mark)):
        if is_allocation(event):
            events.append((event["ts"], _OUTSIDE, event["args"]["Addr"], event["args"]["Bytes"]))
        elif event["name"] in places and event.get("ph") == "X" and event.get("cat") == "user_annotation":
            events += [(event["ts"], places[event["name"]], 0, 0), (event["ts"] + event["dur"], None, 0, 0)]
    live: dict[int, int] = {}
    found, total, entered = [MeasuredSection(*_OUTSIDE, 0, 0)], 0, [_OUTSIDE]
    for _, place, address, nbytes in sorted(events, key=lambda event: event[0]):
        if place != _OUTSIDE:
            entered = entered[:-1] if place is None else [*entered, place]
            found.append(MeasuredSection(*entered[-1], total, total))
            continue
        total += nbytes if nbytes > 0 else -live.pop(address, 0)
        if nbytes > 0:
            live[address] = nbytes
        found[-1] = replace(found[-1], peak_bytes=max(found[-1].peak_bytes, total))
    return found


def _of_cuda(run: Callable[[Mark], Any], device: torch.device) -> list[MeasuredSection]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin = torch.cuda.memory_allocated(device)
    found: list[MeasuredSection] = []
    entered, starts = [_OUTSIDE], [0]

    def boundary() -> None:
        found.append(MeasuredSection(*entered[-1], starts[-1], torch.cuda.max_memory_allocated(device) - begin))
        torch.cuda.reset_peak_memory_stats(device)
        starts.append(torch.cuda.memory_allocated(device) - begin)

    @contextmanager
    def mark(call: UnitCall, is_forward: bool) -> Iterator[None]:
        boundary()
        entered.append((call, is_forward))
        try:
            yield
        finally:
            boundary()
            entered.pop()

    run(mark)
    torch.cuda.synchronize(device)
    boundary()
    return found
