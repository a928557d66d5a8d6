"""The stacked parts sum to what `simulate` says at every step; pictures and traces of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner import InputError, Plan
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import Solution
from planner.report import timeline
from planner.report.timeline import MemoryKind, largest, live_parts
from planner.solver.baselines import all_baselines
from tests.support import graphs
from tests.support.pictures import is_png, is_svg
from tests.support.strategies import schedules, training_graphs
from tests.support.sweeps import plan_of


def agrees(graph: graphs.Graph, schedule: Schedule) -> None:
    total = np.sum(list(live_parts(graph, schedule).values()), axis=0)
    assert total.tolist() == list(simulate(graph, schedule).live_bytes)


@pytest.mark.parametrize("graph", [*(make() for make in graphs.SMALL.values()), graphs.blocks(5), graphs.in_modules()])
def test_parts_sum_to_the_simulated_bytes(graph: graphs.Graph) -> None:
    for _, schedule in all_baselines(graph, 1):
        agrees(graph, schedule)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_parts_sum_to_the_simulated_bytes_of_random_schedules(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    schedule = data.draw(schedules(graph))
    event(f"recomputes: {bool(schedule.recomputes())}")
    agrees(graph, schedule)


def test_each_part_of_a_chain() -> None:
    graph = graphs.chain()
    parts = live_parts(graph, keep_all(graph))
    # x 2, w 3; a 8 and c 8 kept; loss 1 an output, the tangent 1 from the backward on; gc, ga temporary; dw handed out
    assert parts[MemoryKind.PARAMETERS].tolist() == [3] * 6
    assert parts[MemoryKind.INPUTS].tolist() == [2, 2, 3, 4, 4, 4]
    assert parts[MemoryKind.KEPT].tolist() == [8, 16, 16, 16, 8, 0]
    assert parts[MemoryKind.TEMPORARY].tolist() == [0, 0, 0, 4, 8, 4]
    assert parts[MemoryKind.GRADIENTS].tolist() == [0, 0, 0, 0, 0, 3]
    assert not parts[MemoryKind.RECOMPUTED].any() and not parts[MemoryKind.RESERVED].any()


def test_recomputed_values_are_a_part_of_their_own() -> None:
    plan = plan_of(graphs.blocks(6))
    parts = live_parts(plan.graph, plan.solution.schedule)
    boundary = plan.timeline.boundary
    assert parts[MemoryKind.RECOMPUTED][boundary:].any() and not parts[MemoryKind.RECOMPUTED][:boundary].any()


def test_the_largest_at_the_peak_are_named_by_module_with_equal_blocks_as_one() -> None:
    graph = graphs.in_modules()
    plain = simulate(graph, keep_all(graph))
    groups = largest(graph, keep_all(graph), plain.peak_step)
    a = next(group for group in groups if group.place == "h.0-3.up")
    assert (a.count, a.nbytes, a.part) == (4, 8, MemoryKind.KEPT)
    everything = largest(graph, keep_all(graph), plain.peak_step, count=100)
    assert sum(group.count * group.nbytes for group in everything) == plain.peak_bytes


@pytest.mark.parametrize(
    "graph", [graphs.blocks(6), graphs.in_modules(), graphs.statistics()], ids=["blocks", "modules", "workspace"]
)
def test_pictures(graph: graphs.Graph, tmp_path: Path) -> None:
    plan = plan_of(graph, 0.9)
    plan.plot(tmp_path / "step.png")
    timeline.plot(plan, tmp_path / "step.svg")
    assert is_png(tmp_path / "step.png") and is_svg(tmp_path / "step.svg")
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plan.plot(tmp_path / "step.gif")


def test_a_step_of_no_time_can_be_drawn(tmp_path: Path) -> None:
    free = graphs.graph({"x": 1, "a": 1, "t": 1}, [graphs.op("f", "x", "a", 0)], [], "a")
    plan = Plan(free, 10, 0, Solution("optimal", keep_all(free), 0, 0.0, "by hand"))
    plan.plot(tmp_path / "free.png")
    assert is_png(tmp_path / "free.png")
