"""The parts of an estimate are those of the picture of the same step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from planner.analysis.estimate import graph_step, parts_at
from planner.graph.graph import Graph, Kind
from planner.graph.live import MemoryKind, live_parts
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from tests.support import graphs
from tests.support.strategies import training_graphs


@settings(deadline=None, max_examples=50)
@given(training_graphs(max_forward=8))
def test_the_table_and_the_picture_agree_at_every_step(graph: Graph) -> None:
    schedule, timeline = keep_all(graph), simulate(graph, keep_all(graph))
    picture = {kind: live.tolist() for kind, live in live_parts(graph, schedule).items()}
    for step, live_bytes in enumerate(timeline.live_bytes):
        parts = parts_at(graph, schedule, step)
        assert parts.total_bytes == live_bytes
        assert parts.inputs_bytes == picture[MemoryKind.INPUTS][step]
        assert parts.gradients_bytes == picture[MemoryKind.GRADIENTS][step]
        assert parts.activations_bytes == picture[MemoryKind.KEPT][step]
        assert parts.temporaries_bytes == picture[MemoryKind.TEMPORARY][step] >= parts.workspace_bytes


@pytest.mark.parametrize("graph", [make() for make in graphs.SMALL.values()])
def test_the_peak_is_that_of_the_schedule(graph: Graph) -> None:
    step, plain = graph_step(graph), simulate(graph, keep_all(graph))
    assert step.peak_bytes == step.parts.total_bytes == plain.peak_bytes
    tangents = sum(v.nbytes for v in graph.values if v.kind is Kind.TANGENT)
    assert step.parts.inputs_bytes >= tangents * (plain.peak_step >= plain.boundary)
