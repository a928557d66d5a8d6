"""Time every distinct kernel of a graph on this device, and measure its workspace; both are cached on disk."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch.fx import Node

from planner.errors import first_line
from planner.kernels.calls import kernel_key
from planner.kernels.facts import is_collective
from planner.log import PROFILER
from planner.profiler import recheck
from planner.profiler.cache import KernelCache
from planner.profiler.estimate import GENERIC_CPU, GENERIC_GPU, estimate_node
from planner.profiler.forked import Failed, run_forked
from planner.profiler.profile import KernelCost, Profile, spread_of
from planner.profiler.timing import cost_on_cpu, cost_on_cuda, time_on_cpu, time_on_cuda
from planner.report.progress import line


def measure(
    nodes: Sequence[Node],
    device: torch.device,
    *,
    cache_dir: Path | Literal["default"] | None = "default",
    remeasure: bool | None = None,
    progress: bool = True,
) -> Profile:
    """Time every distinct kernel among `nodes` on `device`, or take its cost from a file.

    Of the costs on file, this process times the kernels again that take most of the step (`recheck`).

    On CPU kernels run in a forked child with this process's number of threads; on CUDA in this process, whose cached
    device memory is released and whose peak memory statistics are reset. Never more than one kernel's tensors are
    held. Random generators stay as they are. A kernel that cannot be run (an exception, a crash, not enough memory)
    gets its estimate instead, scaled to the speed of the others.

    Args:
        nodes: call_function nodes with fake tensors in `meta["val"]`; their inputs too.
        device: where to run.
        cache_dir: folder of measured costs; None keeps none; "default" is `planner.profiler.cache.default_cache_dir()`.
        remeasure: True measures every kernel anew; False takes what is on file without timing anything again.
        progress: show a bar on stderr, if that is a terminal, when it takes more than a second.
    """
    keys = {node.name: kernel_key(node) for node in nodes}
    example = {keys[node.name]: node for node in reversed(nodes)}
    cache = KernelCache(cache_dir, _conditions(device))
    counts = Counter(keys.values())
    before = {} if remeasure else {**cache.load(), **cache.settled}  # what this process has used stays as it is
    known = {key: before[key] for key in example if key in before}
    measurable = [key for key in example if not is_collective(example[key])]  # of a collective, the other ranks run none
    again, fresh = set[str](), dict[str, KernelCost]()
    if remeasure is None:
        unsure = {key: known[key] for key in measurable if key in known and key not in cache.settled}
        again, fresh = _rechecked(unsure, counts, example, device)
        known |= fresh
    missing = [key for key in measurable if key not in known or key in again]
    PROFILER.info("%d distinct kernels: %d measured before, %d to measure", len(example), len(known) - len(again), len(missing))
    failures: dict[str, Failed] = {}
    if missing:
        line(f"measure {len(missing)} kernels", progress)
        try:
            for key, found in _with_bar(_run({key: example[key] for key in missing}, device), len(missing), progress):
                if isinstance(found, Failed):
                    failures[key] = found
                elif key in again:
                    fresh[key] = min(found, known[key], key=lambda cost: cost.time_ns)
                else:
                    fresh[key] = found
        finally:
            cache.add(fresh)  # what was measured before a Ctrl-C is not lost
        known |= fresh
    cache.settled.update(known)
    costs = _with_estimates(example, known, device)
    failed = len(example) - len(known)
    _log_failures(failures, known, failed, len(example))
    by_node = {node: costs[key] for node, key in keys.items()}
    if failed and failed == len(example):
        return Profile(by_node, device_name(device), _generic(device).name)
    return Profile(by_node, device_name(device), "", len(example), failed, spread_of(by_node.values()))


def _rechecked(
    known: Mapping[str, KernelCost], counts: Mapping[str, int], example: Mapping[str, Node], device: torch.device
) -> tuple[set[str], dict[str, KernelCost]]:
    """The kernels to measure anew although their costs are on file, and costs with the shorter times that were found."""
    if not known:
        return set(), {}

    def time_again(keys: list[str]) -> Iterator[tuple[str, KernelCost]]:
        for key, cost in _run({key: example[key] for key in keys}, device, only_time=True):
            if not isinstance(cost, Failed):
                yield key, cost

    checked = recheck.check(known, counts, time_again)
    again = {*known} if checked.was_disturbed else {*checked.faster}
    checked.log(known, counts, len(again))
    return again, {key: known[key].timed_as(checked.times[key]) for key in checked.faster}


def _log_failures(failures: Mapping[str, Failed], known: Mapping[str, KernelCost], num_estimated: int, total: int) -> None:
    for key, failure in failures.items():
        PROFILER.debug("not measured: %s: %s", key, failure.reason)
    kept = {key: failure for key, failure in failures.items() if key in known}
    estimated = {key: failure for key, failure in failures.items() if key not in known}
    for group, instead in ((kept, "keep their costs on file"), (estimated, "are estimated")):
        if group:
            key, failure = next(iter(group.items()))
            text = "%d of %d kernels could not be measured, and %s; the first: %s: %s"
            PROFILER.warning(text, len(group), total, instead, key, failure.reason)
    if num_estimated > len(estimated):
        text = "%d of %d kernels communicate, or run on no device here: estimated"
        PROFILER.info(text, num_estimated - len(estimated), total)


def _generic(device: torch.device) -> Any:
    return GENERIC_CPU if device.type == "cpu" else GENERIC_GPU


def _with_estimates(
    example: Mapping[str, Node], known: Mapping[str, KernelCost], device: torch.device
) -> dict[str, KernelCost]:
    """Costs of all kernels: the missing ones estimated, at the speed relative to the estimate that the known ones show."""
    estimates = {key: estimate_node(node, _generic(device)) for key, node in example.items()}
    expected_ns = sum(estimates[key].time_ns for key in known)
    scale = sum(cost.time_ns for cost in known.values()) / expected_ns if expected_ns else 1.0
    scaled = {key: KernelCost(round(cost.time_ns * scale), cost.workspace_bytes) for key, cost in estimates.items()}
    return {key: known.get(key, scaled[key]) for key in example}


def _run(
    kernels: Mapping[str, Node], device: torch.device, *, only_time: bool = False
) -> Iterator[tuple[str, KernelCost | Failed]]:
    """Measure kernels. `only_time`: by few repeats, and their workspace may be left out."""
    keys = list(kernels)
    if device.type == "cpu" and hasattr(os, "fork"):
        run = time_on_cpu if only_time else cost_on_cpu
        jobs: list[Callable[[], KernelCost]] = [partial(run, node) for node in kernels.values()]
        patience_s = [60 + 100 * estimate_node(node, GENERIC_CPU).time_ns / 1e9 for node in kernels.values()]
        for index, cost in run_forked(jobs, patience_s):
            yield keys[index], cost
    elif device.type == "cuda" and torch.cuda.is_available():
        yield from _run_on_cuda(kernels, device, time_on_cuda if only_time else cost_on_cuda)


def _run_on_cuda(
    kernels: Mapping[str, Node], device: torch.device, run: Callable[[Node, torch.device], KernelCost]
) -> Iterator[tuple[str, KernelCost | Failed]]:
    host_state, device_state = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        for key, node in kernels.items():
            cost: KernelCost | Failed
            try:
                cost = run(node, device)
            except Exception as error:
                cost = Failed(first_line(error))
            torch.cuda.empty_cache()  # one kernel's blocks must not crowd out the next one's
            yield key, cost
    finally:
        torch.set_rng_state(host_state)
        torch.cuda.set_rng_state(device_state, device)


def _with_bar(
    results: Iterator[tuple[str, KernelCost | Failed]], total: int, wanted: bool
) -> Iterator[tuple[str, KernelCost | Failed]]:
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (wanted and console.is_terminal))
    task = bar.add_task("measuring kernels", total=total)
    begun, shown = time.monotonic(), False
    try:
        for result in results:
            yield result
            bar.advance(task)
            if not shown and time.monotonic() - begun > 1:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()


def _conditions(device: torch.device) -> dict[str, Any]:
    """Everything but the kernel itself that times depend on."""
    conditions: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        conditions["cudnn"] = [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic]
    return conditions


def device_name(device: torch.device) -> str:
    """The device as a measured time is labelled: its name; of a CPU, the number of threads too."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next(line for line in file if line.startswith("model name")).partition(":")[2].strip()
    return f"{name}, {torch.get_num_threads()} threads"
