"""The same call gives the same plan: in another process, on a busy machine, by a faster clock, with other hash seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

FAST_CLOCK = """
import time
monotonic, perf_counter = time.monotonic, time.perf_counter
time.monotonic, time.perf_counter = (lambda: 5 * monotonic()), (lambda: 5 * perf_counter())
"""

CALL = """
import json, logging
from benchmarks.solver import Case
from planner.solver import solve
from planner.limits import Limits

slices, works = [], []
class Slices(logging.Handler):
    def emit(self, record):
        slices.append([record.args[0], record.getMessage()])
log = logging.getLogger("planner.solver")
log.setLevel(logging.DEBUG)
log.addHandler(Slices())
begin = solve.begin
solve.begin = lambda limits: works.append(begin(limits)) or works[-1]

def limits(effort):
    return Limits(effort, time_limit_s=3600.0)

two, one = Case("gpt2-2", gradients=False), Case("gpt2-1", gradients=False)
found = {}
solution = solve.solve(two.graph, two.budget(0.3), limits(2.0))
found["solve"] = [solution.schedule.steps, solution.bound_ns, solution.status, solution.solver]
swept = solve.sweep(two.graph, [two.budget(f) for f in (0.7, 0.5, 0.4, 0.3)], limits(2.0), gap=1e-6)
found["sweep"] = [[b, s.schedule.steps, s.bound_ns, s.status] for b, s in swept.items() if not isinstance(s, Exception)]
found["lowest peak"] = solve.lowest_peak(one.graph, limits(2.0))
found["work"] = [[work.meter.spent, work.meter.is_late] for work in works]
print(json.dumps(found | {"slices": slices}))
"""


def call(before: str = "", **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", before + CALL],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def busy_machine(processes: int = 4) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(processes):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(other.kill)
        yield


def on_a_busy_machine() -> dict[str, Any]:
    with busy_machine():
        return call(PYTHONHASHSEED="0")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return call(PYTHONHASHSEED="0")


def test_the_call_needs_several_stages_and_all_of_its_work(plain: dict[str, Any]) -> None:
    """Else the tests below say little."""
    assert {"certificate", "segments", "baselines", "local search"} <= {name for name, _ in plain["slices"]}
    assert len(plain["slices"]) >= 16
    solved, lowest = plain["solve"][0], plain["lowest peak"]
    assert len(set(solved)) < len(solved) and lowest > 0
    assert len(plain["sweep"]) >= 3
    assert all(0.0 < spent < 3.0 and not late for spent, late in plain["work"])
    assert len(plain["work"]) == 3 and max(spent for spent, _ in plain["work"]) > 1.8


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(on_a_busy_machine, id="on a busy machine"),
        pytest.param(lambda: call(FAST_CLOCK, PYTHONHASHSEED="1"), id="by a fast clock, with hash seed 1"),
        pytest.param(lambda: call(PYTHONHASHSEED="2"), id="in another process, with hash seed 2"),
    ],
)
def test_the_same_plans_bounds_and_work(again: Callable[[], dict[str, Any]], plain: dict[str, Any]) -> None:
    found = again()
    for what in ("solve", "sweep", "lowest peak", "work", "slices"):
        assert found[what] == plain[what], what
