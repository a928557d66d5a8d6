from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.graph import Graph
from planner.graph.schedule import check, keep_all
from planner.graph.simulate import simulate
from planner.solver import baselines
from planner.solver.lazy import lazy_schedule
from tests.support import graphs
from tests.support.strategies import budgets, training_graphs


def blocks(count: int) -> Graph:
    """`count` blocks x -> wide -> x: narrow places between wide insides, as in a transformer."""
    sizes = {"x": 2, "w": 1, "loss": 1, "t": 1, "dw": 1, "a0": 2}
    forward, backward = [graphs.op("f0", "x w", "a0", 3)], []
    for i in range(count):
        sizes |= {f"h{i}": 20, f"a{i + 1}": 2, f"g{i}": 2}
        forward += [graphs.op(f"up{i}", f"a{i}", f"h{i}", 5), graphs.op(f"down{i}", f"h{i}", f"a{i + 1}", 5)]
        upstream = "t" if i == count - 1 else f"g{i + 1}"
        backward.append(graphs.op(f"b{i}", f"a{i} h{i} {upstream}", f"g{i}", 10))
    forward.append(graphs.op("head", f"a{count}", "loss", 1))
    return graphs.graph(sizes, forward, [*reversed(backward), graphs.op("b", "x g0", "dw", 3)], "loss", "dw")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_baseline_runs_and_greedy_fits_where_it_can(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    budget_bytes = data.draw(budgets(graph))
    for name, schedule in baselines.all_baselines(graph, budget_bytes):
        check(graph, schedule)
        event(f"{name} recomputes: {bool(schedule.recomputes())}")
        assert simulate(graph, schedule).time_ns >= simulate(graph, keep_all(graph)).time_ns
        assert len(set(schedule.recomputes())) <= graph.num_forward_ops


def test_per_block_keeps_the_inputs_of_the_blocks() -> None:
    graph = blocks(6)
    timeline = simulate(graph, baselines.per_block(graph))
    assert timeline.saved == ("a0", "a1", "a2", "a3", "a4", "a5", "loss")
    assert timeline.peak_bytes < simulate(graph, keep_all(graph)).peak_bytes / 2
    # every inside again, and no narrow value twice
    assert timeline.time_ns == simulate(graph, keep_all(graph)).time_ns + 6 * 5


def test_segments_keep_what_crosses_their_cuts() -> None:
    graph = blocks(8)
    saved = simulate(graph, baselines.segments(graph, 4)).saved
    assert len([name for name in saved if name.startswith("a")]) == 3
    assert not [name for name in saved if name.startswith("h")]
    assert simulate(graph, baselines.segments(graph, 1)).saved == ("loss",)


def test_crossing_bytes_of_a_chain() -> None:
    assert baselines.crossing_bytes(graphs.chain()).tolist() == [8, 8, 0]


def test_recompute_all_keeps_outputs_only() -> None:
    assert simulate(graphs.skip(), baselines.recompute_all(graphs.skip())).saved == ("loss",)


def test_greedy_drops_only_as_much_as_it_must() -> None:
    graph = blocks(6)
    plain = simulate(graph, keep_all(graph))
    schedule = baselines.greedy(graph, plain.peak_bytes - 20)
    assert simulate(graph, schedule).peak_bytes <= plain.peak_bytes - 20
    assert 1 <= len(schedule.recomputes()) <= 2
    assert baselines.greedy(graph, plain.peak_bytes) == keep_all(graph)


def test_selective_keeps_the_expensive() -> None:
    graph = graphs.diamond()
    saved = simulate(graph, baselines.selective(graph)).saved
    assert "a" in saved
    assert "l" not in saved


def test_keeping_everything_is_the_plain_step() -> None:
    for make in graphs.SMALL.values():
        graph = make()
        assert lazy_schedule(graph, [value.name for value in graph.values]) == keep_all(graph)
