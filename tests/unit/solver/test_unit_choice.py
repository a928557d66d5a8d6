"""Fronts of units, and the program that picks a point for each: against simulation and against all choices."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.compose import compose
from planner.graph.outer import UnitCall, contracted
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.unit_point import Point, point
from planner.limits import Limits
from planner.solver.unit_choice import Section, choose, lowest, peak_bytes, sections
from planner.solver.unit_front import front, pareto
from tests.support.strategies import training_graphs
from tests.support.unit_graphs import block, whole

NAMES = [f"blocks.{k}" for k in range(3)]
BLOCKS = dict.fromkeys(NAMES, block())


def dominates(one: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(one.figures, other.figures, strict=True))


def test_a_point_says_what_simulate_says():
    graph = block()
    for one in front(graph, Limits(1.0)):
        timeline = simulate(graph, one.schedule)
        saved = sum(graph.value[name].nbytes for name in timeline.saved) - 2  # the block returns 2 bytes
        assert one.saved_bytes == saved and one.time_ns == timeline.time_ns - graph.plain_ns
        assert one.forward_bytes == max(timeline.live_bytes[: timeline.boundary]) - graph.resident_bytes
        live, steps = timeline.live_bytes[timeline.boundary :], one.schedule.steps[timeline.boundary :]
        # x, dy and what the block returns, 2 bytes each, are freed after their last reads
        reads = {name: [t for t, i in enumerate(steps) if name in graph.ops[i].reads] for name in ("x", "dy", "a3")}
        freed = [sum(2 for own in reads.values() if all(read < t for read in own)) for t in range(len(steps))]
        backward = max(a - b for a, b in zip(live, freed, strict=True)) - graph.resident_bytes - graph.tangent_bytes - 2
        assert one.backward_bytes == max(saved, backward) and one.beyond_bytes == one.backward_bytes - saved


def test_a_front_is_a_front():
    graph = block()
    found = front(graph, Limits(1.0))
    assert found[0].time_ns == 0 and len(found) > 2
    assert not any(dominates(a, b) for a, b in itertools.permutations(found, 2))
    plain = point(graph, keep_all(graph))
    assert any(dominates(one, plain) for one in found)


@given(training_graphs())
@settings(deadline=None, max_examples=8)
def test_no_schedule_that_is_known_beats_a_front(graph):
    found = front(graph, Limits(0.05))
    assert any(dominates(one, point(graph, keep_all(graph))) for one in found)
    assert not any(dominates(a, b) for a, b in itertools.permutations(found, 2))


def test_the_first_of_equal_points_stays():
    schedule = keep_all(block())
    a, b, c = (
        Point(schedule, *figures, source) for figures, source in (((1, 1, 1, 1), "a"), ((1, 1, 1, 1), "b"), ((0, 2, 1, 1), "c"))
    )
    assert {one.source for one in pareto([a, b, c])} == {"a", "c"}


def test_what_a_choice_holds_is_what_simulate_finds():
    graph, own = whole(3), block()
    made = compose(contracted(graph, BLOCKS), dict.fromkeys(NAMES, own))
    points = front(own, Limits(1.0))
    fronts = dict.fromkeys(NAMES, points)
    places = sections(made, fronts)
    for taken in itertools.product(range(0, len(points), max(1, len(points) // 4)), repeat=3):
        choice = dict(zip(NAMES, taken, strict=True))
        schedule = made.schedule({name: points[at].schedule for name, at in choice.items()})
        assert max(peak_bytes(section, fronts, choice) for section in places) == simulate(made.graph, schedule).peak_bytes


@st.composite
def problems(draw):
    """Random units, each with a few points and called once or twice, and random outer bytes; the backward is in reverse."""
    seeded = random.Random(draw(st.integers(0, 10**6)))
    count = seeded.randint(1, 3)
    names = [f"u{i}" for i in range(count)]
    schedule = keep_all(block())

    def one():
        saved = seeded.randint(0, 9)
        return Point(schedule, saved, seeded.randint(0, 9), saved + seeded.randint(0, 9), seeded.randint(0, 9))

    fronts = {name: pareto(one() for _ in range(seeded.randint(1, 4))) for name in names}
    places = []
    calls = [UnitCall(name, k) for k in range(2) for name in names if k == 0 or seeded.random() < 0.5]
    for i, call in enumerate(calls):
        own = fronts[call.unit]
        places.append(Section(seeded.randint(0, 5), frozenset(calls[:i]), call, tuple(one.forward_bytes for one in own)))
        places.append(Section(seeded.randint(0, 5), frozenset(calls[: i + 1])))
        places.append(Section(seeded.randint(0, 5), frozenset(calls[:i]), call, tuple(one.backward_bytes for one in own)))
    return fronts, places, seeded.randint(5, 40)


@given(problems())
@settings(deadline=None, max_examples=60)
def test_the_choice_is_the_best_of_all(problem):
    fronts, places, budget = problem
    choices = [dict(zip(fronts, at, strict=True)) for at in itertools.product(*(range(len(own)) for own in fronts.values()))]

    def peak(choice):
        return max(peak_bytes(section, fronts, choice) for section in places)

    def spent(choice):
        calls = {section.call for section in places if section.call is not None}
        return sum(fronts[call.unit][choice[call.unit]].time_ns for call in calls)

    fitting = [spent(choice) for choice in choices if peak(choice) <= budget]
    found = choose(places, fronts, budget, plain_ns=1)
    assert (found is None) == (not fitting)
    if found is not None:
        assert peak(found.points) <= budget
        assert spent(found.points) == min(fitting) and found.bound_ns <= min(fitting)
    assert peak(lowest(places, fronts)) == min(map(peak, choices))
