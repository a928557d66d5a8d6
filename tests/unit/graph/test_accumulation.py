"""The graph of a step that finds gradients: stages, what dies with them, and that the first micro-step needs no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.accumulation import HELD, accumulating, num_stages
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from tests.support import graphs
from tests.support.strategies import schedules, training_graphs


def with_stages(graph: Graph, stages: int | None) -> Graph:
    nbytes = sum(graph.value[name].nbytes for name in graph.backward_outputs)
    return accumulating(graph, graph.backward_outputs, nbytes, stages)


def many_gradients() -> Graph:
    """Blocks whose backward ops each return what they write."""
    graph = graphs.blocks(4)
    return replace(graph, backward_outputs=tuple(name for i in graph.backward_ops for name in graph.ops[i].writes))


def test_a_gradient_dies_at_the_end_of_its_stage() -> None:
    graph = many_gradients()
    made = with_stages(graph, 2)
    ends = [op for op in made.ops if not op.nodes]
    assert len(ends) == num_stages(made) == 2
    assert sorted(name for op in ends for name in op.reads) == sorted(graph.backward_outputs)
    assert made.backward_outputs == () and made.value[HELD].nbytes == sum(graph.value[n].nbytes for n in graph.backward_outputs)
    timeline = simulate(made, keep_all(made))
    for end in ends:
        step = made.ops.index(end)
        later = {name for op in made.ops[step + 1 :] for name in op.reads}
        assert set(end.reads) - later == set(timeline.frees[step]) != set()
        assert all(made.producer[name] < step for name in end.reads)


def test_without_stages_a_gradient_dies_once_it_is_there() -> None:
    graph = many_gradients()
    made = with_stages(graph, None)
    assert [set(made.ops[i + 1].reads) for i, op in enumerate(made.ops) if set(op.writes) & set(graph.backward_outputs)] == [
        set(graph.ops[i].writes) for i in graph.backward_ops
    ]
    last = made.ops[-2]  # of the backward; what follows in `graph` belongs to no stage
    assert made.ops[-1].reads == last.writes


@pytest.mark.parametrize("stages", [1, 2, 3, 64])
def test_gradients_are_shared_out_evenly(stages: int) -> None:
    graph = many_gradients()
    sizes = [len(op.reads) for op in with_stages(graph, stages).ops if not op.nodes]
    assert len(sizes) == min(stages, len(graph.backward_outputs)) and max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(1, 4))
def test_the_first_micro_step_needs_no_more(data: st.DataObject, stages: int) -> None:
    graph = data.draw(training_graphs())
    made = with_stages(graph, stages)
    schedule = data.draw(schedules(made))
    numbers = {op.name: i for i, op in enumerate(graph.ops)}
    first = Schedule(tuple(numbers[made.ops[i].name] for i in schedule.steps if made.ops[i].nodes))
    assert simulate(graph, first).peak_bytes <= simulate(made, schedule).peak_bytes
    assert HELD in made.value and num_stages(graph) == 0
