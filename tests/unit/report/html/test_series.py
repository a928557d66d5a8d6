"""What is drawn of a schedule is bounded, keeps the peak, and holds what `simulate` says at every drawn step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.report.html.series import Series, drawn_steps, series
from planner.report.stack import Stack
from tests.support import graphs
from tests.support.strategies import schedules, training_graphs


def live(drawn: Series) -> list[int]:
    """Bytes at the drawn steps, summed up from what is held."""
    total = np.zeros(len(drawn.steps), dtype=np.int64)
    for held in drawn.held:
        total[held.first : held.last + 1] += held.nbytes
    return total.tolist()


def series_of(graph: graphs.Graph, schedule: Schedule, most: int) -> Series:
    return series(graph, schedule, Stack(graph, (schedule,)), most)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(4, 12))
def test_drawn_steps_hold_the_simulated_bytes(data: st.DataObject, most: int) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    schedule = data.draw(schedules(graph))
    drawn, simulated = series_of(graph, schedule, most), simulate(graph, schedule)
    assert live(drawn) == [simulated.live_bytes[t] for t in drawn.steps]
    assert simulated.peak_step in drawn.steps and drawn.timeline.peak_bytes == max(live(drawn))
    assert len(drawn.steps) <= max(most, 6)
    starts = np.cumsum([0, *(graph.ops[i].cost_ns for i in schedule.steps)])
    assert drawn.start_ns == tuple(starts[list(drawn.steps)].tolist())


@pytest.mark.parametrize("most", [50, 400])
def test_a_long_step_is_thinned_to_its_outline(most: int) -> None:
    graph = graphs.blocks(400)
    schedule = keep_all(graph)
    drawn, simulated = series_of(graph, schedule, most), simulate(graph, schedule)
    assert len(schedule.steps) > 4 * 50 and len(drawn.steps) <= most
    assert max(live(drawn)) == simulated.peak_bytes
    # every stretch of the time is drawn
    gaps = np.diff([*drawn.start_ns, simulated.time_ns])
    assert gaps.max() <= 4 * simulated.time_ns / (most / 2)


def test_short_steps_are_drawn_whole() -> None:
    graph = graphs.blocks(5)
    assert series_of(graph, keep_all(graph), 1000).steps == tuple(range(len(graph.ops)))


def test_steps_that_take_no_time_are_thinned_too() -> None:
    bytes_live, starts = np.arange(100, dtype=np.int64), np.zeros(100, dtype=np.int64)
    assert drawn_steps(bytes_live, starts, [0, 57, 99], 10).tolist() == [0, 57, 99]


def test_what_is_alike_is_one_entry() -> None:
    graph = graphs.in_modules()
    drawn = series_of(graph, keep_all(graph), 8)
    whole = series_of(graph, keep_all(graph), 1000)
    assert len(drawn.held) < len(whole.held)
    assert {held.module for held in whole.held} >= {"", "h.0.up", "h.3.down"}
    inputs = [held for held in whole.held if held.op < 0 and held.first == 0]
    assert sum(held.nbytes for held in inputs) == graph.resident_bytes
