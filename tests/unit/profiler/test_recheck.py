"""Times on file are checked against fresh ones: what was measured on a busy machine is not believed for ever."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.profiler import measure as measure_module
from planner.profiler import recheck
from planner.profiler.cache import KernelCache
from planner.profiler.forked import Failed
from planner.profiler.measure import measure
from planner.profiler.profile import KernelCost
from tests.support.nodes import mm

CPU = torch.device("cpu")


def cost(time_ns, spread_ns=0, workspace_bytes=0):
    return KernelCost(time_ns, workspace_bytes, (), time_ns, spread_ns, 5)


def nodes(*sizes):
    made = []
    for size in sizes:
        made.append(mm(size))
        made[-1].name = f"mm_{size}_{len(made)}"
    return made


class Machine:
    """In place of the device: kernels of size n take `speed * n` ns; says what was timed."""

    def __init__(self, monkeypatch, speed=1000, spread_ns=0):
        self.speed, self.spread_ns, self.timed, self.checked = speed, spread_ns, [], []
        monkeypatch.setattr(measure_module, "_run", self.run)

    def run(self, kernels, device, *, only_time=False):
        for key, node in kernels.items():
            size = node.meta["val"].shape[0]
            (self.checked if only_time else self.timed).append(size)
            yield key, cost(self.speed * size, self.spread_ns)


def next_process():
    KernelCache._settled.clear()


def times(profile):
    return sorted({cost.time_ns for cost in profile.costs.values()})


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, logger="planner.profiler"):
        yield caplog


def test_a_busy_first_run_is_found_out_by_the_next_process(monkeypatch, tmp_path, log):
    made, machine = nodes(10, 20, 300, 400), Machine(monkeypatch, speed=3000)
    assert times(measure(made, CPU, cache_dir=tmp_path)) == [30_000, 60_000, 900_000, 1_200_000]
    next_process()
    machine.speed, machine.timed = 1000, []
    log.clear()
    assert times(measure(made, CPU, cache_dir=tmp_path)) == [10_000, 20_000, 300_000, 400_000]
    assert machine.checked == [400] and sorted(machine.timed) == [10, 20, 300, 400]  # a kernel tells of all the others
    (said,) = [record.message for record in log.records if "on file again" in record.message]
    assert "timed 1 kernels" in said and "55 % of the step" in said and "faster by 67 %" in said and "4 kernels" in said
    next_process()
    assert times(measure(made, CPU, cache_dir=tmp_path, remeasure=False)) == [10_000, 20_000, 300_000, 400_000]  # on file


def test_what_agrees_is_kept_and_checked_once_in_a_process(monkeypatch, tmp_path, log):
    made, machine = nodes(100, 90), Machine(monkeypatch)
    first = measure(made, CPU, cache_dir=tmp_path)
    machine.speed, machine.timed = 950, []
    assert measure(made, CPU, cache_dir=tmp_path) == first and not machine.checked  # measured by this process
    next_process()
    assert measure(made, CPU, cache_dir=tmp_path) == first
    assert measure(made, CPU, cache_dir=tmp_path) == first
    assert machine.checked == [100] and not machine.timed
    assert any("0 differ" in record.message for record in log.records)


def test_slower_now_keeps_what_is_on_file(monkeypatch, tmp_path, log):
    made, machine = nodes(100), Machine(monkeypatch)
    first = measure(made, CPU, cache_dir=tmp_path)
    next_process()
    machine.speed, machine.timed = 2000, []
    assert measure(made, CPU, cache_dir=tmp_path) == first and not machine.timed
    assert any("slower by 100 %" in record.message and "remeasure=True" in record.message for record in log.records)
    assert times(measure(made, CPU, cache_dir=tmp_path, remeasure=True)) == [200_000]
    next_process()
    assert times(measure(made, CPU, cache_dir=tmp_path, remeasure=False)) == [200_000]


def test_measured_anew_the_faster_time_counts(monkeypatch, tmp_path):
    """What is timed again because of another kernel may be disturbed now, and was not then."""
    made, machine = nodes(500, 10), Machine(monkeypatch, speed=3000)
    measure(made, CPU, cache_dir=tmp_path)
    next_process()
    machine.run = lambda kernels, device, only_time=False: (
        (key, cost(500_000 if node.meta["val"].shape[0] == 500 else 90_000)) for key, node in kernels.items()
    )
    monkeypatch.setattr(measure_module, "_run", machine.run)
    assert times(measure(made, CPU, cache_dir=tmp_path)) == [30_000, 500_000]


def test_the_time_of_the_check_counts_too(monkeypatch, tmp_path):
    made = nodes(100)
    monkeypatch.setattr(measure_module, "_run", lambda kernels, *_, **__: ((key, cost(900, 0, 64)) for key in kernels))
    measure(made, CPU, cache_dir=tmp_path)
    answers = {True: cost(100), False: cost(500, 0, 32)}
    again = lambda kernels, device, only_time=False: ((key, answers[only_time]) for key in kernels)
    monkeypatch.setattr(measure_module, "_run", again)
    next_process()
    (found,) = measure(made, CPU, cache_dir=tmp_path).costs.values()
    assert found == cost(100, 0, 64)
    next_process()
    assert set(measure(made, CPU, cache_dir=tmp_path, remeasure=False).costs.values()) == {found}, "not on file"


def test_remeasure_false_times_nothing_again(monkeypatch, tmp_path):
    made, machine = nodes(100), Machine(monkeypatch, speed=3000)
    first = measure(made, CPU, cache_dir=tmp_path)
    next_process()
    machine.speed, machine.timed = 1000, []
    assert measure(made, CPU, cache_dir=tmp_path, remeasure=False) == first
    assert measure(made, CPU, cache_dir=tmp_path) == first  # the same call gives the same plan
    assert not machine.timed and not machine.checked


def test_a_kernel_that_cannot_be_timed_again_keeps_its_cost(monkeypatch, tmp_path):
    made = nodes(100)
    Machine(monkeypatch)
    first = measure(made, CPU, cache_dir=tmp_path)
    next_process()
    failing = lambda kernels, device, only_time=False: ((key, Failed("no")) for key in kernels)
    monkeypatch.setattr(measure_module, "_run", failing)
    assert measure(made, CPU, cache_dir=tmp_path) == first


def test_costs_on_file_are_not_called_estimated_where_measuring_anew_fails(monkeypatch, tmp_path, log):
    made, machine = nodes(100), Machine(monkeypatch)
    measure(made, CPU, cache_dir=tmp_path)
    next_process()
    machine.speed = 100
    failing = lambda kernels, device, only_time=False: ((key, cost(10_000) if only_time else Failed("no")) for key in kernels)
    monkeypatch.setattr(measure_module, "_run", failing)
    found = measure(made, CPU, cache_dir=tmp_path)
    assert found.num_estimated == 0 and times(found) == [10_000]
    (said,) = [record.message for record in log.records if "could not be measured" in record.message]
    assert "1 of 1 kernels" in said and "keep their costs on file" in said and "estimated" not in said


def test_what_another_process_writes_changes_no_cost_in_use(monkeypatch, tmp_path):
    made = nodes(100)
    Machine(monkeypatch)
    first = measure(made, CPU, cache_dir=tmp_path)
    (file,) = tmp_path.glob("kernels-*.json")
    content = json.loads(file.read_text())
    content["kernels"] = {key: [7, *row[1:]] for key, row in content["kernels"].items()}
    file.write_text(json.dumps(content))
    assert measure(made, CPU, cache_dir=tmp_path) == first


def test_the_check_is_bounded():
    minute = 60_000_000_000
    known = {f"{i}": cost(1000) for i in range(100)} | {"long": cost(minute)}
    counts = dict.fromkeys(known, 1)
    assert recheck.kernels_to_recheck(known, counts) == ["0", "1", "10", "11", "12"]  # and not the one that takes minutes
    counts["7"] = 10**9
    assert recheck.kernels_to_recheck({**known, "long": cost(1)}, counts) == ["7"]  # it is more than half of the step
    assert recheck.kernels_to_recheck({}, {}) == [] and recheck.kernels_to_recheck({"a": cost(0)}, {"a": 3}) == []


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_times_agree_within_the_spread_of_the_faster_one(first, second, spread, other):
    one, two = cost(first, spread), cost(second, other)
    assert recheck.agree(one, two) == recheck.agree(two, one)
    quiet, loud = sorted((one, two), key=lambda cost: cost.time_ns)
    if first != second:
        assert recheck.agree(one, two) == (loud.time_ns <= quiet.time_ns + max(quiet.spread_ns, quiet.time_ns / 10))


def test_repeats_are_kept_with_their_spread(tmp_path):
    (found,) = measure(nodes(64), CPU, cache_dir=tmp_path).costs.values()
    assert found.num_repeats >= 2 and found.median_ns >= found.time_ns > 0 and found.spread_ns >= 0
    next_process()
    (again,) = measure(nodes(64), CPU, cache_dir=tmp_path, remeasure=False).costs.values()
    assert again == found
