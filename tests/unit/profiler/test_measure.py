import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from planner.profiler import cache as cache_module
from planner.profiler import measure as measure_module
from planner.profiler import recheck
from planner.profiler.cache import KernelCache
from planner.profiler.forked import Failed, run_forked
from planner.profiler.measure import measure
from planner.profiler.profile import KernelCost
from planner.profiler.timing import cpu_workspace_bytes, free_bytes
from tests.support.nodes import aten, crash, meta, mm, node, on_function, refuse

CPU = torch.device("cpu")
MIB = 2**20


def all_measured(profile):
    return not profile.model and not profile.num_estimated and profile.num_kernels > 0


def profile_of(made, **kwargs):
    return measure([made], CPU, cache_dir=None, **kwargs)


def counting(folder):
    """A kernel that leaves a file in `folder` each time it runs: the child's memory cannot be looked into."""

    def kernel(x):
        (folder / f"{time.monotonic_ns()}").touch()
        return x + 1

    return kernel


@pytest.fixture
def busy_thread_pools():
    """Several threads, and pools of theirs that the parent has used: what hangs a careless child."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    x = torch.rand(512, 512, requires_grad=True)
    torch.nn.functional.conv2d((x @ x).view(1, 16, 128, 128), torch.rand(16, 16, 3, 3)).relu().sum().backward()
    yield
    torch.set_num_threads(before)


def test_bigger_costs_more_after_the_parent_used_its_threads(busy_thread_pools):
    small, big = mm(64), mm(1024)
    big.name = "big"
    profile = measure([small, big], CPU, cache_dir=None)
    assert (profile.model, profile.num_kernels, profile.num_estimated) == ("", 2, 0)
    assert "4 threads" in profile.device
    assert profile.costs["big"].time_ns > 10 * profile.costs["mm_default"].time_ns


def test_child_runs_with_the_parents_threads(busy_thread_pools):
    def report():
        return KernelCost(torch.get_num_threads(), 0)

    assert list(run_forked([report], [60])) == [(0, KernelCost(4, 0))]


def two_temporaries(x):
    first = torch.empty(3 * MIB, dtype=torch.uint8)
    second = torch.empty(2 * MIB, dtype=torch.uint8)
    del first, second
    return torch.empty(4 * MIB, dtype=torch.uint8)


def one_temporary_beside_the_output(x):
    out = torch.empty(MIB, dtype=torch.uint8)
    torch.empty(5 * MIB, dtype=torch.uint8)
    return out


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (two_temporaries, MIB),  # the temporaries are gone before the output exists: 5 at the peak, 4 at the end
        (one_temporary_beside_the_output, 5 * MIB),
        (torch.ops.aten.neg.default, 0),
        (torch.ops.aten.neg_.default, 0),
    ],
)
def test_workspace_is_peak_minus_what_stays(function, expected):
    (cost,) = profile_of(on_function(function)).costs.values()
    assert cost.workspace_bytes == expected


def test_workspace_of_convolution_backward():
    grad, x, w = torch.rand(4, 16, 32, 32), torch.rand(4, 8, 32, 32), torch.rand(16, 8, 3, 3)
    geometry = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    made = node(aten.convolution_backward.default, grad, x, w, *geometry, out=(x.to("meta"), w.to("meta"), None))
    found = profile_of(made).costs["convolution_backward_default"].workspace_bytes
    smallest_copy = min(t.numel() * t.element_size() for t in (grad, x, w))
    assert smallest_copy <= found <= 4 * 4 * (grad.numel() + x.numel() + w.numel())


def test_workspace_reads_the_exported_trace():
    """Fails when torch renames the fields of "[memory]" events: see planner/profiler/memory.py."""
    assert cpu_workspace_bytes(lambda: one_temporary_beside_the_output(None)) == 5 * MIB


def test_equal_kernels_share_a_measurement(tmp_path):
    kernel = counting(tmp_path)
    first, second = on_function(kernel), on_function(kernel)
    second.name = "second"
    profile = measure([first, second], CPU, cache_dir=None)
    assert profile.costs[first.name] == profile.costs["second"]


def test_cache_hit_runs_nothing_and_a_corrupt_file_is_replaced(tmp_path):
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    runs.mkdir()
    made = on_function(counting(runs))
    first = measure([made], CPU, cache_dir=cache)
    num_runs = len(list(runs.iterdir()))
    assert num_runs > 0
    assert measure([made], CPU, cache_dir=cache) == first
    assert len(list(runs.iterdir())) == num_runs
    (file,) = cache.glob("*.json")
    for junk in ("", "{", "[]", '{"conditions": 1}', file.read_text()[:-9], file.read_text().replace("[", "[-", 1)):
        file.write_text(junk)
        KernelCache._settled.clear()  # as in another process
        num_runs = len(list(runs.iterdir()))
        assert all_measured(measure([made], CPU, cache_dir=cache))
        assert len(list(runs.iterdir())) > num_runs
        assert json.loads(file.read_text())["kernels"]
    assert {path.suffix for path in cache.iterdir()} <= {".json", ".lock"}


def test_cache_merges_and_keeps_conditions_apart(tmp_path):
    one, other = (KernelCache(tmp_path, {"threads": 1}) for _ in range(2))
    one.add({"a": KernelCost(1, 2)})
    other.add({"b": KernelCost(3, 4)})
    assert one.load() == {"a": KernelCost(1, 2), "b": KernelCost(3, 4)}
    assert KernelCache(tmp_path, {"threads": 2}).load() == {}


WRITER = """
import sys
from pathlib import Path
from planner.profiler.cache import KernelCache
from planner.profiler.profile import KernelCost

cache = KernelCache(Path(sys.argv[1]), {})
print("ready", flush=True)
sys.stdin.readline()
for i in range(100):
    cache.add({f"{sys.argv[2]}{i}": KernelCost(i, 0)})
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert set(KernelCache(tmp_path, {}).load()) == {f"{name}{i}" for name in "ab" for i in range(100)}


def test_a_file_that_another_process_holds_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_LOCK_TIMEOUT_S", 0.05)
    held = KernelCache(tmp_path, {})
    with FileLock(held.path.with_suffix(".lock")):
        held.add({"a": KernelCost(1, 2)})
    assert held.load() == {}
    held.add({"a": KernelCost(1, 2)})
    assert held.load() == {"a": KernelCost(1, 2)}


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CHECKPOINT_PLANNER_CACHE", str(tmp_path / "named"))
    assert KernelCache("default", {}).path.parent == tmp_path / "named"
    monkeypatch.delenv("CHECKPOINT_PLANNER_CACHE")
    if sys.platform == "linux":
        assert KernelCache("default", {}).path.parent == tmp_path / "xdg" / "checkpoint-planner"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert KernelCache("default", {}).path.parent == Path.home() / ".cache/checkpoint-planner"
    assert KernelCache(None, {}).path is None


def unwritable(folder):
    folder.touch()


def removed(folder):
    next(folder.glob("*.json")).unlink()


def corrupt(folder):
    next(folder.glob("*.json")).write_text("junk")


@pytest.mark.parametrize("spoiled", [unwritable, removed, corrupt])
def test_a_process_keeps_its_costs_whatever_becomes_of_the_file(tmp_path, spoiled):
    folder, runs = tmp_path / "cache", tmp_path / "runs"
    runs.mkdir()
    if spoiled is unwritable:
        spoiled(folder)
    made = on_function(counting(runs))
    first = measure([made], CPU, cache_dir=folder)
    assert all_measured(first)
    if spoiled is not unwritable:
        spoiled(folder)
    num_runs = len(list(runs.iterdir()))
    assert measure([made], CPU, cache_dir=folder) == measure([made], CPU, cache_dir=folder, remeasure=False) == first
    assert len(list(runs.iterdir())) == num_runs
    measure([made], CPU, cache_dir=folder, remeasure=True)
    assert len(list(runs.iterdir())) > num_runs


def test_kernels_on_cuda_are_timed_alone_where_only_times_are_checked(monkeypatch):
    """In place of the device: its functions do nothing, and an event says how many there were before it."""
    events, calls = itertools.count(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = next(events)

        def elapsed_time(self, other):
            return other.at_ms - self.at_ms

    nothing = lambda *args, **kwargs: None
    for name in ("synchronize", "empty_cache", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", nothing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=8))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: torch.zeros(*args, **kwargs))
    made = on_function(lambda x: calls.append(x))
    ((key, cost),) = measure_module._run({"it": made}, torch.device("cuda"), only_time=True)
    assert key == "it" and (cost.time_ns, cost.workspace_bytes, cost.num_repeats) == (1_000_000, 0, 3)
    assert len(calls) <= recheck._CALLS


def test_crash_and_exception_fall_back_and_the_rest_is_measured(tmp_path):
    before, after = mm(16), mm(32)
    after.name = "after"
    profile = measure([before, on_function(crash), on_function(refuse), after], CPU, cache_dir=tmp_path)
    assert (profile.model, profile.num_kernels, profile.num_estimated) == ("", 4, 2)
    assert all(profile.costs[name].time_ns > 0 for name in ("mm_default", "crash", "refuse", "after"))
    assert "crash" not in next(tmp_path.glob("*.json")).read_text()


def test_a_kernel_too_big_for_the_machine_falls_back():
    huge = node(aten.neg.default, torch.empty(1).expand(2**45), out=meta(2**45))
    assert profile_of(huge).model == "generic CPU"


@pytest.mark.parametrize("content", [None, "MemTotal: 8 kB\n"])
def test_free_memory_is_unknown_where_the_system_does_not_say(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    monkeypatch.setattr("planner.profiler.timing._MEMINFO", tmp_path / "meminfo")
    assert free_bytes() is None


def test_free_memory_is_what_can_be_allocated(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemFree: 1 kB\nMemAvailable: 5 kB\n")
    monkeypatch.setattr("planner.profiler.timing._MEMINFO", tmp_path / "meminfo")
    assert free_bytes() == 5 * 1024


def test_unknown_device_is_estimated():
    assert measure([mm(8)], torch.device("xpu"), cache_dir=None).model == "generic GPU"


def test_nothing_to_measure():
    assert measure([], CPU, cache_dir=None).costs == {}


def test_a_hanging_kernel_takes_the_rest_with_it():
    hang, quick = lambda: time.sleep(60), lambda: KernelCost(1, 0)
    begun = time.monotonic()
    assert list(run_forked([quick, hang, quick], [30, 0.3, 30])) == [
        (0, KernelCost(1, 0)),
        (1, Failed("its process did not answer in time")),
        (2, Failed("not run: one before it did not answer")),
    ]
    assert time.monotonic() - begun < 20


def test_many_crashes_are_given_up():
    results = list(run_forked([lambda: crash(None)] * 30, [30] * 30))
    assert [i for i, _ in results] == list(range(30))
    reasons = [found.reason for _, found in results]
    assert all("killed by signal" in reason for reason in reasons[:8])
    assert reasons[8:] == ["not run: 8 processes ended before it"] * 22


def test_parent_is_left_as_it_was(capfd):
    made = [on_function(aten.bernoulli.p, torch.rand(4 * MIB)), on_function(aten.neg.default, torch.rand(8 * MIB))]
    made[0].args = (*made[0].args, 0.5)
    rng, descriptors = torch.get_rng_state(), set(os.listdir("/proc/self/fd"))
    gc.collect()
    before = resident_bytes()
    assert all_measured(measure(made, CPU, cache_dir=None))
    assert resident_bytes() - before < 4 * MIB
    assert torch.equal(rng, torch.get_rng_state())
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
