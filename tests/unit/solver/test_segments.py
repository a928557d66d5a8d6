"""Pieces, their menus and segments: menus are the lower hull of all kept sets, segments what their table says."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.graph import Graph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.solver import pieces as pieces_module
from planner.solver import segments
from planner.solver.local_search import LocalSearch
from planner.solver.pieces import Option, Pieces
from planner.solver.segments import Segments
from planner.solver.tuning import FEW, PIECES
from planner.solver.work import Work
from tests.support import graphs
from tests.support.strategies import budgets, training_graphs

FACTORS = [n / 100 for n in range(97, 111)]


def filled(pieces: Pieces, budget_bytes: int, *, again: bool = False) -> Segments:
    table = Segments(pieces, budget_bytes, again=again)
    assert table.fill(Work())
    return table


def every_option(pieces: Pieces, ops: range) -> list[tuple[int, int]]:
    """Bytes and time of every kept set of a run, by hand."""
    graph, life = pieces.graph, pieces.life
    mine = [d for d in range(len(life.names)) if life.producer[d] in ops and life.last_forward[d] < ops.stop]
    found = []
    for count in range(len(mine) + 1):
        for kept in combinations(mine, count):
            missing = [d for d in mine if d not in kept and life.first_use[d] < len(graph.ops)]
            reruns: set[int] = set()
            while missing:
                i = int(life.producer[missing.pop()])
                if i not in reruns:
                    reruns.add(i)
                    missing += [d for d in pieces.inputs(i) if d in mine and d not in kept]
            if all(graph.ops[i].recomputable for i in reruns):
                found.append((sum(int(life.nbytes[d]) for d in kept), sum(graph.ops[i].cost_ns for i in reruns)))
    return found


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_menu_is_the_lower_hull_of_all_kept_sets(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    pieces = Pieces(graph, 4)
    i = data.draw(st.sampled_from(range(len(pieces))))
    j = data.draw(st.sampled_from(range(i + 1, len(pieces) + 1)))
    run = pieces.ops(i, j)
    menu, everything = pieces.options(i, j, Work()), every_option(pieces, run)
    event(f"options: {len(menu)}")
    assert [option.nbytes for option in menu] == sorted({option.nbytes for option in menu}, reverse=True)
    for option in menu:
        assert option.cost_ns == sum(graph.ops[op].cost_ns for op in option.reruns)
        # With as few bytes nothing takes less time, but for the nanosecond that every op costs in the program besides its own.
        assert all(cost >= option.cost_ns - len(run) for nbytes, cost in everything if nbytes <= option.nbytes)
    for nbytes, cost in everything:
        assert cost >= _on_hull(menu, nbytes) - 2 * len(run) - 1


def _on_hull(menu: list[Option], nbytes: int) -> float:
    """The time that mixing options takes for so many bytes."""
    if nbytes >= menu[0].nbytes:
        return menu[0].cost_ns
    return float(np.interp(nbytes, [option.nbytes for option in menu[::-1]], [option.cost_ns for option in menu[::-1]]))


def test_runs_that_look_alike_share_a_menu_and_others_do_not() -> None:
    graph = graphs.blocks(12)
    pieces = Pieces(graph, 100)
    assert len(pieces) >= 12
    runs = [pieces.ops(i, i + 1) for i in range(len(pieces))]
    inner = [i for i, ops in enumerate(runs) if [graph.ops[op].name[:2] for op in ops] == ["fa", "fm", "fc"]]
    first, second = (pieces.options(i, i + 1, Work()) for i in inner[2:4])
    assert len(pieces._options) == 1
    shift = runs[inner[3]].start - runs[inner[2]].start
    assert [tuple(op + shift for op in option.reruns) for option in first] == [option.reruns for option in second]
    assert len(first) == 2
    pieces.options(inner[2], inner[4], Work())
    assert len(pieces._options) == 2


def test_runs_that_read_different_outputs_of_alike_ops_do_not_look_alike() -> None:
    forward = [
        graphs.op("f0", "x", "a0 m0", 3),
        graphs.op("f1", "a0", "c0", 3),
        graphs.op("f2", "x", "a1 m1", 3),
        graphs.op("f3", "m1", "c1", 3),
        graphs.op("floss", "c1", "loss", 1),
    ]
    backward = [graphs.op("b1", "a1 m1 c1 t", "g1", 1), graphs.op("b0", "a0 m0 c0 g1", "g0", 1)]
    sizes = {"x": 1, "t": 1, "loss": 1, "a0": 8, "m0": 8, "c0": 4, "a1": 8, "m1": 8, "c1": 4, "g0": 1, "g1": 1}
    pieces = Pieces(graphs.graph(sizes, forward, backward, "loss", "g0"), 100)
    first, second = pieces._signature(range(2)), pieces._signature(range(2, 4))
    assert first[0] == second[0] and first[1] != second[1]


@pytest.mark.parametrize("again", [False, True])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_segments_take_the_time_their_table_says_and_more_memory_is_never_dearer(again: bool, data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    table = filled(Pieces(graph, 100), data.draw(budgets(graph)), again=again)
    costs = table._cells[0, len(table.pieces)].best
    assert list(costs) == sorted(costs, reverse=True)
    plain = simulate(graph, keep_all(graph)).time_ns
    schedules = {factor: table.schedule(factor) for factor in (0.5, *FACTORS, 1.001, 1.999)}
    event(f"schedules: {min(len({*schedules.values()} - {None}), 4)}")
    for factor, schedule in schedules.items():
        cost = costs[round(factor * (20 * PIECES))]
        assert (schedule is None) == np.isinf(cost)
        assert schedule is None or simulate(graph, schedule).time_ns <= plain + cost


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_to_run_a_prefix_again_is_taken_only_where_it_is_cheaper(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    budget_bytes, pieces = data.draw(budgets(graph)), Pieces(graph, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_LENGTHS", (1,))  # runs are single pieces where they may run again
        once, again = (filled(pieces, budget_bytes, again=again)._cells[0, len(pieces)].best for again in (False, True))
    event(f"cheaper: {bool((again < once).any())}")
    assert (again <= once).all()


@pytest.mark.parametrize("again", [False, True])
def test_a_table_filled_in_slices_is_that_filled_at_once(again: bool) -> None:
    graph = recurrent(16)
    budget_bytes = simulate(graph, keep_all(graph)).peak_bytes // 3
    at_once, table, slices = filled(Pieces(graph, 100), budget_bytes, again=again), None, 1
    table = Segments(Pieces(graph, 100), budget_bytes, again=again)
    assert not table.fill(Work(0.0)), "no work, no table"
    while not table.fill(Work(0.003)):
        slices += 1
    assert slices >= 3
    assert [table.schedule(factor) for factor in FACTORS] == [at_once.schedule(factor) for factor in FACTORS]


def recurrent(count: int) -> Graph:
    """A long unrolled net: a state goes on from step to step, cheap to make again where the one before it is at hand."""
    forward, backward = [], []
    sizes = {f"{kind}{i}": nbytes for i in range(count) for kind, nbytes in (("h", 8), ("a", 8), ("g", 2))}
    for i in range(count):
        before = f"h{i - 1}" if i else "x"
        forward.append(graphs.op(f"fa{i}", before, f"a{i}", 4))
        forward.append(graphs.op(f"fh{i}", f"a{i}", f"h{i}", 2))
    forward.append(graphs.op("floss", f"h{count - 1}", "loss", 1))
    for i in reversed(range(count)):
        after = f"g{i + 1}" if i + 1 < count else "t"
        before = f"h{i - 1}" if i else "x"
        backward.append(graphs.op(f"b{i}", f"a{i} {before} {after}", f"g{i}", 9))
    return graphs.graph({"x": 8, "t": 1, "loss": 1, **sizes}, forward, backward, "loss", "g0")


def test_the_segments_of_a_long_recurrent_net_grow_from_its_end_to_its_start() -> None:
    graph = recurrent(60)
    plain = simulate(graph, keep_all(graph))
    budget_bytes = plain.peak_bytes // 5
    table = filled(Pieces(graph, 100), budget_bytes)
    schedules = {factor: schedule for factor in FACTORS if (schedule := table.schedule(factor)) is not None}
    assert any(simulate(graph, schedule).peak_bytes <= budget_bytes for schedule in schedules.values())
    lengths = [choice.k - i for i, choice in table._path(0, len(table.pieces), (20 * PIECES))]
    assert max(lengths[: len(lengths) // 2]) >= 13  # without a trace of a state kept in between
    assert max(lengths[len(lengths) // 2 :]) <= 8
    assert max(lengths[-5:]) <= 3
    # As long as the graph is a chain, the table's count of memory is the simulator's but for rounding.
    for factor, schedule in schedules.items():
        assert simulate(graph, schedule).peak_bytes <= (factor * (20 * PIECES) + 1 + len(table.pieces)) * table.unit


def test_a_segment_is_recomputed_more_than_once_where_memory_is_short() -> None:
    graph = graphs.blocks(12)
    table = filled(Pieces(graph, 50), simulate(graph, keep_all(graph)).peak_bytes // 3, again=True)
    most = 0
    schedules = {table.schedule(n / 100) for n in range(1, 200)} - {None}
    assert len(schedules) >= 5
    for schedule in schedules:
        assert schedule is not None
        useful, run = LocalSearch(graph, 0).useful(list(schedule.steps))
        assert int(run.live_bytes.max()) == simulate(graph, Schedule(tuple(useful))).peak_bytes
        most = max(most, max(Counter(useful).values()))
    assert most >= 3


@pytest.mark.parametrize("again", [False, True])
def test_a_budget_below_every_segment_has_no_schedule_of_segments(again: bool) -> None:
    table = filled(Pieces(recurrent(8), 100), 3, again=again)
    assert [table.schedule(factor) for factor in FACTORS] == [None] * len(FACTORS)


def test_a_menu_is_cut_short_at_so_many_options(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"v{i}" for i in range(20)]
    forward = [graphs.op(f"f{i}", "x", name, (i + 1) ** 2) for i, name in enumerate(names)]
    forward.append(graphs.op("floss", " ".join(names), "loss", 1))
    backward = [graphs.op("b", f"{' '.join(names)} t", "g", 1)]
    graph = graphs.graph({"x": 1, "t": 1, "loss": 1, "g": 1, **dict.fromkeys(names, 8)}, forward, backward, "loss", "g")
    assert len(Pieces(graph, 1).options(0, 1, Work())) == 3 * FEW
    monkeypatch.setattr(pieces_module, "FEW", 100)
    assert len(Pieces(graph, 1).options(0, 1, Work())) == 21
