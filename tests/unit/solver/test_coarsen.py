from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.graph import Graph
from planner.graph.schedule import check, keep_all
from planner.graph.simulate import simulate
from planner.solver.coarsen import coarsen, expand, uncoarsened
from planner.solver.lazy import lazy_schedule
from planner.solver.lifetimes import lifetimes
from tests.support import graphs
from tests.support.strategies import random_schedule, training_graphs


def elementwise() -> Graph:
    """A wide value, two elementwise ops on it in a row, and the loss: only the end of the row is worth keeping.

    x --f0--> a --scale--> s --shift--> y --f3--> loss
    """
    return graphs.graph(
        {"x": 1, "w": 1, "a": 4, "s": 8, "y": 8, "loss": 1, "t": 1, "gy": 2, "ga": 2, "dw": 1},
        [
            graphs.op("f0", "x w", "a", 4),
            graphs.op("scale", "a", "s", 3, 1),
            graphs.op("shift", "s", "y", 2, 5),
            graphs.op("f3", "y", "loss", 1),
        ],
        [graphs.op("b3", "y t", "gy", 1), graphs.op("b2", "a gy", "ga", 4), graphs.op("b0", "x ga", "dw", 4)],
        "loss",
        "dw",
    )


def test_neighbours_merge_and_what_lies_between_becomes_workspace() -> None:
    coarse = coarsen(elementwise())
    assert coarse.groups == ((0,), (1, 2), (3,), (4,), (5,), (6,))
    assert coarse.graph.num_forward_ops == 3
    merged = coarse.graph.ops[1]
    assert (merged.name, merged.reads, merged.writes, merged.cost_ns, merged.workspace_bytes) == (
        "shift",
        ("a",),
        ("y",),
        5,
        13,
    )
    assert merged.nodes == ("scale", "shift")
    assert "s" not in coarse.graph.value


@pytest.mark.parametrize("name", ["chain", "diamond", "skip", "dropout"])
def test_what_the_backward_reads_or_what_grows_stays_apart(name: str) -> None:
    graph = graphs.SMALL[name]()
    assert coarsen(graph).graph == graph


def test_an_op_that_cannot_run_again_passes_it_on() -> None:
    graph = elementwise()
    once = graphs.op("shift", "s", "y", 2, 5, recomputable=False)
    coarse = coarsen(Graph((*graph.ops[:2], once, *graph.ops[3:]), graph.values, graph.inputs, ("loss",), ("dw",), 4))
    assert not coarse.graph.ops[1].recomputable


def test_tiny_values_are_not_worth_a_decision() -> None:
    graph = graphs.statistics()
    values = tuple(type(v)(v.name, v.nbytes * (1 if v.name in ("stat", "loss") else 10**6), v.kind) for v in graph.values)
    large = Graph(graph.ops, values, graph.inputs, graph.forward_outputs, graph.backward_outputs, graph.num_forward_ops)
    assert coarsen(large).tiny == {"stat", "loss"}
    assert uncoarsened(large).tiny == frozenset()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_an_expanded_schedule_is_valid_costs_the_same_and_holds_no_more(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    coarse = coarsen(graph)
    event(f"merged: {len(coarse.groups) < len(graph.ops)}")
    assert [i for group in coarse.groups for i in group] == list(range(len(graph.ops)))
    schedule = random_schedule(data.draw, coarse.graph)
    expanded = expand(schedule, coarse.groups)
    check(graph, expanded)
    small, large = simulate(coarse.graph, schedule), simulate(graph, expanded)
    assert large.time_ns == small.time_ns
    assert large.peak_bytes <= small.peak_bytes


@settings(deadline=None, max_examples=60)
@given(training_graphs(max_forward=7))
def test_the_backward_of_the_coarse_plain_step_is_the_original_one(graph: Graph) -> None:
    coarse = coarsen(graph)
    small, large = simulate(coarse.graph, keep_all(coarse.graph)), simulate(graph, keep_all(graph))
    assert small.live_bytes[small.boundary :] == large.live_bytes[large.boundary :]
    assert small.saved == large.saved


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_the_plain_row_of_a_kept_set_is_what_the_simulator_sees(data: st.DataObject) -> None:
    """Keep everything droppable: base, what is finished and still wanted, and what the op reads, make up the live bytes."""
    graph = data.draw(training_graphs(max_forward=7))
    life = lifetimes(graph)
    lasting = {name for name, last in zip(life.names, life.last_use, strict=True) if last >= 0}
    live = simulate(graph, lazy_schedule(graph, lasting)).live_bytes
    for t, base in enumerate(life.base.tolist()):
        held = [
            d for d, name in enumerate(life.names) if name in lasting and life.last_forward[d] < t and life.last_use[d] >= t
        ]
        assert base + sum(int(life.nbytes[d]) for d in held) == live[t]
