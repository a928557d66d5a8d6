"""Bytes that are live at marked places of a piece of code, and the most between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Mark = Callable[[str], AbstractContextManager[Any]]
"""While its context is entered, a place of this name runs."""
_PREFIX = "checkpoint_planner: "


@dataclass(frozen=True, slots=True)
class Stretch:
    """What lies between two boundaries of marked places, in order of time.

    Attributes:
        name: of the innermost marked place; "" outside of them all.
        start_bytes: allocated at its start, above what was at the beginning.
        peak_bytes: the most in it, likewise.
    """

    name: str
    start_bytes: int
    peak_bytes: int


def stretches(run: Callable[[Mark], Any], device: torch.device) -> list[Stretch]:
    """The stretches of `run(mark)`, by the allocator's own events on a CPU, by its statistics on CUDA."""
    return _of_cpu(run) if device.type != "cuda" else _of_cuda(run, device)


def _of_cpu(run: Callable[[Mark], Any]) -> list[Stretch]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run(lambda name: record_function(f"{_PREFIX}{name}"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events: list[tuple[float, str | None, int, int]] = []  # time, name or None for the end of a place, address, bytes
    for event in trace:
        if event["name"] == "[memory]" and event["args"]["Device Type"] == 0:
            events.append((event["ts"], "", event["args"]["Addr"], event["args"]["Bytes"]))
        elif event["name"].startswith(_PREFIX) and event.get("ph") == "X" and event.get("cat") == "user_annotation":
            name = event["name"].removeprefix(_PREFIX)
            events += [(event["ts"], name, 0, 0), (event["ts"] + event["dur"], None, 0, 0)]
    live: dict[int, int] = {}
    found, total, names = [Stretch("", 0, 0)], 0, [""]
    for _, name, address, nbytes in sorted(events, key=lambda event: event[0]):
        if nbytes == 0 and name != "":
            names = names[:-1] if name is None else [*names, name]
            found.append(Stretch(names[-1], total, total))
            continue
        total += nbytes if nbytes > 0 else -live.pop(address, 0)
        if nbytes > 0:
            live[address] = nbytes
        found[-1] = Stretch(found[-1].name, found[-1].start_bytes, max(found[-1].peak_bytes, total))
    return found


def _of_cuda(run: Callable[[Mark], Any], device: torch.device) -> list[Stretch]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin = torch.cuda.memory_allocated(device)
    found: list[Stretch] = []
    names, starts = [""], [0]

    def boundary() -> None:
        found.append(Stretch(names[-1], starts[-1], torch.cuda.max_memory_allocated(device) - begin))
        torch.cuda.reset_peak_memory_stats(device)
        starts.append(torch.cuda.memory_allocated(device) - begin)

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        boundary()
        names.append(name)
        try:
            yield
        finally:
            boundary()
            names.pop()

    run(mark)
    torch.cuda.synchronize(device)
    boundary()
    return found
