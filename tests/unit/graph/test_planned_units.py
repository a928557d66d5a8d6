"""What a budget leaves to a unit of a planned step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.outer import contracted
from planner.graph.planned_units import PlannedKind, PlannedUnitGraphs
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.solver.unit_front import front
from tests.support.unit_graphs import block, whole

NAMES = [f"blocks.{k}" for k in range(3)]
BLOCKS = dict.fromkeys(NAMES, block())
POINTS = front(block(), Limits(0.5))
SCHEDULES = tuple(one.schedule for one in POINTS)
PEAKS = [simulate(block(), schedule).peak_bytes for schedule in SCHEDULES]


def planned(positions, budget):
    kind = PlannedKind("Block", block(), SCHEDULES)
    units = {name: (0, at) for name, at in zip(NAMES, positions, strict=True)}
    return PlannedUnitGraphs((kind,), units, contracted(whole(3), BLOCKS), budget)


POSITION = st.integers(0, len(SCHEDULES) - 1)


@given(st.tuples(POSITION, POSITION, POSITION), st.integers(0, 2), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_what_a_unit_may_take_more_is_within_the_budget(positions, unit, above):
    """Another backward of one unit, which saves no more and takes what is left at most, keeps the step within the budget."""
    peak = planned(positions, 1).peak_bytes
    step = planned(positions, peak + above)
    spare = step.spare_bytes[NAMES[unit]]
    assert 0 <= spare <= above + sum(one.nbytes for one in block().values)
    for at, one in enumerate(POINTS):
        own = positions[unit]
        if one.saved_bytes <= POINTS[own].saved_bytes and PEAKS[at] <= PEAKS[own] + spare:
            others = [at if k == unit else own for k, own in enumerate(positions)]
            assert planned(others, 1).peak_bytes <= peak + above


def test_a_larger_budget_leaves_more():
    at = (0, len(SCHEDULES) - 1, 0)
    peak = planned(at, 1).peak_bytes
    assert all(planned(at, peak + 100).spare_bytes[name] >= 80 for name in NAMES)
    assert planned(at, peak - 50).spare_bytes == dict.fromkeys(NAMES, 0)
