"""The parts of the floor sum up to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from planner.graph.floor import floor, floor_advice, floor_parts, has_one_sample
from planner.graph.graph import Graph, Kind, Value, reserved_name
from tests.support import graphs
from tests.support.strategies import training_graphs


def agrees(graph: Graph) -> None:
    parts = floor_parts(graph)
    assert sum(nbytes for _, nbytes in parts) == floor(graph)[0]
    assert all(nbytes > 0 for _, nbytes in parts)


@pytest.mark.parametrize("graph", [*(make() for make in graphs.SMALL.values()), graphs.in_modules(), graphs.many_modules(9)])
def test_parts_sum_to_the_floor(graph: Graph) -> None:
    agrees(graph)
    agrees(replace(graph, in_flight=3))


@settings(deadline=None, max_examples=60)
@given(training_graphs(max_forward=8))
def test_parts_sum_to_the_floor_of_random_graphs(graph: Graph) -> None:
    agrees(graph)


def test_each_part_of_a_chain() -> None:
    graph = graphs.chain()
    state = Value(reserved_name("optimizer state"), 100, Kind.RESERVED)
    graph = replace(graph, values=(*graph.values, state), inputs=(*graph.inputs, state.name))
    # b1, of the backward, reads a and gc and writes ga
    expected = {
        "inputs": 2,
        "parameters": 3,
        "gradients of outputs": 1,
        "optimizer state": 100,
        "outputs": 1,
        "a": 8,
        "gc": 4,
        "ga": 4,
    }
    assert dict(floor_parts(graph)) == expected
    assert "reserve less" in floor_advice(graph)


@pytest.mark.parametrize(
    ("form", "is_one"),
    [("float32[1, 4]", True), ("float32[1]", True), ("float32[]", False), ("float32[2, 4]", False), ("", False)],
)
def test_a_batch_of_one_is_not_to_be_reduced(form: str, is_one: bool) -> None:
    graph = graphs.chain()
    scalar = Value("scale", 4, Kind.INPUT, form="float32[]")
    values = [replace(value, form=form) if value.kind is Kind.INPUT else value for value in graph.values]
    graph = replace(graph, values=(*values, scalar), inputs=(*graph.inputs, scalar.name))
    assert has_one_sample(graph) is is_one
    assert ("reduce the batch" in floor_advice(graph)) is not is_one
