"""The simulator against a checker that follows every instance of every value by itself, slowly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.graph.graph import Graph, Kind
from planner.graph.schedule import Schedule, check, keep_all
from planner.graph.simulate import simulate
from tests.support import graphs
from tests.support.strategies import random_schedule, training_graphs


def instances(graph: Graph, steps: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """(value, step that writes it, last step at which this instance must exist), one row for each instance."""
    rows = []
    outputs = {*graph.forward_outputs, *graph.backward_outputs}
    for t, i in enumerate(steps):
        for name in graph.ops[i].writes:
            rewrites = [s for s in range(t + 1, len(steps)) if name in graph.ops[steps[s]].writes]
            until = rewrites[0] if rewrites else len(steps)
            reads = [s for s in range(t + 1, until) if name in graph.ops[steps[s]].reads]
            first = all(name not in graph.ops[s].writes for s in steps[:t])
            rows.append((name, t, len(steps) if first and name in outputs else max([t, *reads])))
    return rows


def slow_live_bytes(graph: Graph, steps: tuple[int, ...]) -> list[int]:
    nbytes = {value.name: value.nbytes for value in graph.values}
    forward = set(range(graph.num_forward_ops))
    rows, live = instances(graph, steps), []
    for t, i in enumerate(steps):
        in_backward = forward <= set(steps[:t])
        resident = sum(v.nbytes for v in graph.values if v.name in graph.inputs and (v.kind is not Kind.TANGENT or in_backward))
        held = sum(nbytes[name] for name, born, dies in rows if born <= t <= dies)
        live.append(resident + held + graph.ops[i].workspace_bytes)
    return live


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_simulate_agrees_with_the_slow_checker(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=6))
    schedule = random_schedule(data.draw, graph)
    timeline = simulate(graph, schedule)
    event(f"recomputes: {bool(schedule.recomputes())}")
    expected = slow_live_bytes(graph, schedule.steps)
    assert list(timeline.live_bytes) == expected
    assert timeline.peak_bytes == max(expected)
    assert timeline.peak_step == expected.index(max(expected))
    assert timeline.time_ns == sum(graph.ops[i].cost_ns for i in schedule.steps)
    rows = instances(graph, schedule.steps)
    for t, dying in enumerate(timeline.frees):
        assert Counter(dying) == Counter(name for name, _, dies in rows if dies == t)
    turn = graph.num_forward_ops
    assert timeline.boundary == turn
    outputs = {*graph.forward_outputs, *graph.backward_outputs}
    assert timeline.saved == tuple(sorted({n for n, born, dies in rows if born < turn and (dies >= turn or n in outputs)}))


def test_the_plain_chain_step_by_step() -> None:
    timeline = simulate(graphs.chain(), keep_all(graphs.chain()))
    # x + w, then a, c and the loss; the tangent comes with the backward, gc and ga live one op each, dw stays
    assert timeline.live_bytes == (13, 21, 22, 27, 23, 14)
    assert timeline.saved == ("a", "c", "loss")
    assert timeline.peak_bytes == 27
    assert timeline.peak_step == 3
    assert timeline.time_ns == 20


def test_a_recompute_lowers_the_peak_and_costs_its_time() -> None:
    graph = graphs.chain()
    schedule = Schedule((0, 1, 2, 3, 0, 4, 5))
    timeline = simulate(graph, schedule)
    assert "a" not in timeline.saved
    assert timeline.live_bytes == (13, 21, 14, 19, 19, 23, 14)
    assert timeline.time_ns == 25


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 1, 2, 3, 4, 5, 6), "names op 6"),
        ((1, 0, 2, 3, 4, 5), "before f0"),
        ((0, 1, 3, 2, 4, 5), "before forward op f2"),
        ((0, 1, 2, 4, 3, 5), "reads gc before it is written"),
        ((0, 1, 2, 3, 4), "op b0 never runs"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate(graphs.chain(), Schedule(steps))


def test_an_op_that_cannot_run_again_is_refused() -> None:
    with pytest.raises(ScheduleError, match="state again, which cannot be recomputed exactly"):
        check(graphs.dropout(), Schedule((0, 1, 2, 3, 4, 0, 5, 6, 7, 8)))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_schedules_are_valid(data: st.DataObject) -> None:
    graph = data.draw(st.sampled_from(sorted(graphs.SMALL)).map(lambda name: graphs.SMALL[name]()))
    schedule = random_schedule(data.draw, graph)
    check(graph, schedule)
    event(f"recomputes: {bool(schedule.recomputes())}")
    assert all(t >= graph.num_forward_ops for t in schedule.recomputes())
