"""What is largest at a step is named, equal blocks as one."""

from __future__ import annotations

from dataclasses import replace

from planner.graph.graph import Kind, Value, reserved_name
from planner.graph.live import MemoryKind
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.report.largest import largest
from tests.support import graphs


def test_the_largest_at_the_peak_are_named_by_module_with_equal_blocks_as_one() -> None:
    graph = graphs.in_modules()
    plain = simulate(graph, keep_all(graph))
    groups = largest(graph, keep_all(graph), plain.peak_step, 7)
    a = next(group for group in groups if group.place == "h.0-3.up")
    assert (a.count, a.nbytes, a.part) == (4, 8, MemoryKind.KEPT)
    everything = largest(graph, keep_all(graph), plain.peak_step, count=100)
    assert sum(group.count * group.nbytes for group in everything) == plain.peak_bytes


def test_bytes_set_aside_are_named_after_what_they_are_for() -> None:
    graph = graphs.chain()
    state = Value(reserved_name("optimizer state"), 100, Kind.RESERVED)
    graph = replace(graph, values=(*graph.values, state), inputs=(*graph.inputs, state.name))
    assert largest(graph, keep_all(graph), 0, 1)[0].name == "optimizer state"


def test_names_are_not_read() -> None:
    """Values are alike by their kernel; a name that ends in a number is no other name."""
    graph = graphs.blocks(4)
    renamed = replace(graph, ops=tuple(replace(op, kernel=f"kernel {i}") for i, op in enumerate(graph.ops)))
    step = simulate(graph, keep_all(graph)).peak_step
    groups = [group for group in largest(renamed, keep_all(renamed), step, count=100) if group.place]
    assert groups and all(group.count == 1 for group in groups)
    assert {group.name for group in groups} <= {*graph.value, *(f"workspace of {op.name}" for op in graph.ops)}
