"""One thread, and no test that leaves torch's switches otherwise than it found them.

The models are tiny: on a busy machine threads that wait for one another take most of a step's time.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; processes that tests start inherit it

import pytest

from planner._compat.switches import global_switches


@pytest.fixture(autouse=True)
def _switches_stay():
    """A switch left behind decides in which kernels the next tests' plans are made, and whether another process takes them."""
    before = global_switches()
    yield
    after = global_switches()
    assert after == before, f"left behind: {set(after) ^ set(before)}"
