"""One thread, and no test that leaves torch's switches otherwise than it found them.

The models are tiny: on a busy machine threads that wait for one another take most of a step's time.
"""

import gc
import os
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start inherit it

import pytest

from planner._compat.switches import global_switches


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what `one_in` leaves for the slow runs, before pytest selects by markers. Names decide: all combinations mix."""
    for item in items:
        one_in = item.get_closest_marker("one_in")
        if one_in is not None and zlib.crc32(item.name.encode()) % one_in.args[0]:
            item.add_marker(pytest.mark.zoo)


def pytest_collection_finish():
    """What is imported by now stays: no collection of garbage need look at it again (a few percent of a run)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _switches_stay():
    """A switch left behind decides in which kernels the next tests' plans are made, and whether another process takes them."""
    before = global_switches()
    yield
    after = global_switches()
    assert after == before, f"left behind: {set(after) ^ set(before)}"
