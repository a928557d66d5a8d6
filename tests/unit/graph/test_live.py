"""The parts sum to what `simulate` says at every step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.accumulation import HELD
from planner.graph.graph import Graph, Kind, Value, reserved_name
from planner.graph.live import MemoryKind, live_parts, spans
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.solver.baselines import all_baselines
from tests.support import graphs
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


def test_what_other_forwards_saved_is_live_all_the_time() -> None:
    graph = replace(graphs.blocks(5), in_flight=3)
    for _, schedule in all_baselines(graph, 1):
        agrees(graph, schedule)
        assert set(live_parts(graph, schedule)[MemoryKind.IN_FLIGHT].tolist()) != {0}


def reserving(graph: graphs.Graph, name: str) -> graphs.Graph:
    value = Value(name, 100, Kind.RESERVED)
    return replace(graph, values=(*graph.values, value), inputs=(*graph.inputs, name))


def test_bytes_set_aside_are_live_all_the_time() -> None:
    for name, part in ((reserved_name("optimizer state"), MemoryKind.RESERVED), (HELD, MemoryKind.GRADIENTS)):
        graph = reserving(graphs.chain(), name)
        agrees(graph, keep_all(graph))
        assert (live_parts(graph, keep_all(graph))[part] >= 100).all()


def test_without_ops_nothing_runs() -> None:
    graph = Graph(
        ops=(), values=(Value("w", 4, Kind.PARAM),), inputs=("w",), forward_outputs=(), backward_outputs=(), num_forward_ops=0
    )
    assert [span.name for span in spans(graph, keep_all(graph)) if span.start <= 0 <= span.end] == ["w"]
    assert all(len(parts) == 0 for parts in live_parts(graph, keep_all(graph)).values())
