"""Time and workspace of one kernel, on the device it runs on.

A kernel inside a step finds its inputs partly in cache: running it again and again on the same tensors is too cheap,
flushing the cache before every call is too dear. Both are measured, in pairs, and `KernelTime.of` combines them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from planner._compat import pytree
from planner._compat.collectives import collectives_forbidden
from planner._compat.tensors import storage_id
from planner.kernels.calls import footprint_bytes, make_inputs
from planner.kernels.observed import is_foreign
from planner.profiler.memory import cpu_allocations, peak_of
from planner.profiler.profile import KernelCost

_BUDGET_NS = 40_000_000
"""Time for repeating one kernel, in ns."""

_LONG_NS = 20_000_000
"""A call this long is measured warm only: the time to fetch what a cache holds (2-3 ms) is lost in it."""

_TURN_NS = 2_000_000
"""Shorter than any turn of the system's scheduler: a call this fast was not held up."""

_MEMINFO = Path("/proc/meminfo")

_MIN_PAIRS, _MAX_PAIRS = 3, 30
_COLD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class KernelTime:
    """The time of one kernel in ns, of several repeats.

    Attributes:
        fastest_ns: of the fastest warm and the fastest cold call, because everything that disturbs a call makes it longer.
        median_ns, spread_ns: median and interquartile range of the repeats.
        num_repeats: how many there were.
    """

    fastest_ns: int
    median_ns: int
    spread_ns: int
    num_repeats: int

    @staticmethod
    def of(warm: Sequence[int], cold: Sequence[int]) -> KernelTime:
        """Of calls with their inputs in cache and calls without, in pairs: a call in a step is between the two."""
        times = [_in_situ_ns(one, other) for one, other in zip(warm, cold, strict=False)]
        low, median, high = np.percentile(times, (25, 50, 75))
        return KernelTime(_in_situ_ns(min(warm), min(cold)), round(median), round(high - low), len(times))

    def cost(self, workspace_bytes: int = 0, hidden_bytes: tuple[int, ...] = ()) -> KernelCost:
        """The kernel's cost."""
        return KernelCost(self.fastest_ns, workspace_bytes, hidden_bytes, self.median_ns, self.spread_ns, self.num_repeats)


def cost_on_cpu(node: Node) -> KernelCost:
    """Time and workspace of one call. Meant for a forked child: it leaves holes in the heap.

    Raises:
        MemoryError: the call needs more than the machine has free.
        Exception: any that the kernel raises.
    """
    check_memory(node)
    with torch.no_grad(), forbidding_collectives(node):
        args, kwargs = make_inputs(node)
        call: Callable[[], Any] = lambda: node.target(*args, **kwargs)  # type: ignore[operator]
        # warm-up: code pages, thread pools, packed weights
        hidden_bytes = _hidden_bytes(node, call())
        workspace_bytes = cpu_workspace_bytes(call)
        return _time_on_cpu(call).cost(workspace_bytes, hidden_bytes)


def time_on_cpu(node: Node) -> KernelCost:
    """Time alone of one call, of the fewest repeats; for a forked child, like `cost_on_cpu`, and it raises the same."""
    check_memory(node)
    with torch.no_grad(), forbidding_collectives(node):
        args, kwargs = make_inputs(node)
        call: Callable[[], Any] = lambda: node.target(*args, **kwargs)  # type: ignore[operator]
        call()  # warm-up
        return _time_on_cpu(call, budget_ns=0).cost()


def check_memory(node: Node) -> None:
    """Raise MemoryError where a call needs more than the machine has free."""
    free = free_bytes()
    if free is not None and footprint_bytes(node) > free:
        raise MemoryError(f"{node.name} needs {footprint_bytes(node)} bytes, {free} are free")


def forbidding_collectives(node: Node) -> AbstractContextManager[Any]:
    """While entered, what an operator from outside of torch communicates inside is an exception: the other ranks do not."""
    return collectives_forbidden() if is_foreign(node.target) else nullcontext()


def _time_on_cpu(call: Callable[[], Any], budget_ns: int = _BUDGET_NS) -> KernelTime:
    """With one thread its CPU time, in which other processes hardly show; with several, the wall clock.

    A thread that must wait for a busy core holds up all the others: then a call of .1 ms takes a scheduler's turn of
    4 to 8 ms, every time (seen). But threads are used because one alone is slower, so one alone bounds the time.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return _time_in_pairs(call, time.thread_time_ns, budget_ns)
    together = _time_in_pairs(call, time.perf_counter_ns, budget_ns)
    if not _TURN_NS <= together.fastest_ns <= 10 * _LONG_NS:
        return together
    torch.set_num_threads(1)
    try:
        alone = _time_in_pairs(call, time.thread_time_ns, budget_ns=0, min_pairs=2)
        return min(together, alone, key=lambda found: found.fastest_ns)
    finally:
        torch.set_num_threads(num_threads)


def _time_in_pairs(
    call: Callable[[], Any], clock: Callable[[], int], budget_ns: int, min_pairs: int = _MIN_PAIRS
) -> KernelTime:
    first_ns = _clocked(call, clock)
    flush = _cache_filler() if first_ns < _LONG_NS else None
    warm, cold = [first_ns], []
    end = time.perf_counter_ns() + budget_ns
    while len(warm) < min_pairs or (len(warm) < _MAX_PAIRS and time.perf_counter_ns() < end):
        if flush is not None:
            flush.fill_(1.0)
            cold.append(_clocked(call, clock))
        warm.append(_clocked(call, clock))
        if first_ns > 10 * _BUDGET_NS:
            break
    return KernelTime.of(warm, cold or warm)


def _clocked(call: Callable[[], Any], clock: Callable[[], int]) -> int:
    start = clock()
    out = call()
    end = clock()
    del out  # after the clock: freeing belongs to whoever reads it last
    return end - start


def _in_situ_ns(warm_ns: int, cold_ns: int) -> int:
    """The time of a call in a step: between that of a warm one and that of a cold one."""
    return round(warm_ns + _COLD_SHARE * max(0, cold_ns - warm_ns))


def cpu_workspace_bytes(call: Callable[[], Any]) -> int:
    """Peak minus net of the CPU allocator's events during one call, outputs alive at its end; in bytes."""
    outputs: list[Any] = []
    events = cpu_allocations(lambda: outputs.append(call()))
    return peak_of(events) - sum(nbytes for _, nbytes in events)


def _hidden_bytes(node: Node, out: Any) -> tuple[int, ...]:
    """Per storage that a call makes, the bytes beyond those that its fake output promises."""
    known = {storage_id(tensor) for arg in node.all_input_nodes for tensor in _tensors(arg.meta["val"])}
    hidden: list[int] = []
    for fake, real in zip(_tensors(node.meta["val"]), _tensors(out), strict=False):
        if storage_id(fake) not in known:
            known.add(storage_id(fake))
            hidden.append(max(0, real.untyped_storage().nbytes() - fake.untyped_storage().nbytes()))
    return tuple(hidden) if any(hidden) else ()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@lru_cache(maxsize=1)
def _cache_filler() -> torch.Tensor:
    return torch.empty(_last_level_cache_bytes() // 4, dtype=torch.float32, device="cpu")


def _last_level_cache_bytes() -> int:
    for index in (3, 2):
        with suppress(OSError, ValueError, KeyError):
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text(encoding="ascii").strip()
            return min(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]], 2**27)
    return 2**25


def free_bytes() -> int | None:
    """Bytes of main memory that can be allocated without swapping; None (unknown) on systems other than Linux."""
    with suppress(OSError, ValueError, StopIteration), _MEMINFO.open(encoding="ascii") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return None


def cost_on_cuda(node: Node, device: torch.device) -> KernelCost:
    """Time and workspace of one call, in this process; reads and resets the device's peak memory statistics.

    Raises:
        Exception: any that the kernel raises; torch.cuda.OutOfMemoryError among them.
    """
    with torch.no_grad(), torch.cuda.device(device), forbidding_collectives(node):
        args, kwargs = make_inputs(node)
        call: Callable[[], Any] = lambda: node.target(*args, **kwargs)  # type: ignore[operator]
        call()  # warm-up: algorithm choice, library handles and their lasting workspaces
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = call()
        torch.cuda.synchronize(device)
        workspace_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        hidden_bytes = _hidden_bytes(node, out)
        del out
        return _time_on_cuda(call, device).cost(workspace_bytes, hidden_bytes)


def time_on_cuda(node: Node, device: torch.device) -> KernelCost:
    """Time alone of one call, of the fewest repeats; raises as `cost_on_cuda` does."""
    with torch.no_grad(), torch.cuda.device(device), forbidding_collectives(node):
        args, kwargs = make_inputs(node)
        call: Callable[[], Any] = lambda: node.target(*args, **kwargs)  # type: ignore[operator]
        call()  # warm-up
        return _time_on_cuda(call, device, budget_ns=0).cost()


def _time_on_cuda(call: Callable[[], Any], device: torch.device, budget_ns: int = _BUDGET_NS) -> KernelTime:
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)
    warm: list[int] = []
    cold: list[int] = []
    end = time.perf_counter_ns() + budget_ns
    while len(warm) < _MIN_PAIRS or (len(warm) < _MAX_PAIRS and time.perf_counter_ns() < end):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        flush.zero_()  # also keeps the device busy while the host launches what is timed
        marks[0].record()
        call()
        marks[1].record()
        call()
        marks[2].record()
        torch.cuda.synchronize(device)
        cold.append(round(marks[0].elapsed_time(marks[1]) * 1e6))
        warm.append(round(marks[1].elapsed_time(marks[2]) * 1e6))
    return KernelTime.of(warm, cold)
