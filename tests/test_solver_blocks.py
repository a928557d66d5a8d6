"""Pieces, their menus and blocks: menus are the lower hull of all kept sets, blocks what their table says."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.solver import blocks as blocks_module
from planner.solver import pieces as pieces_module
from planner.solver.blocks import FINE, ROOMS, Blocks
from planner.solver.pieces import Dish, Pieces
from tests import graphs
from tests.strategies import budgets, training_graphs


def soon() -> float:
    return time.monotonic() + 60


def every_dish(pieces: Pieces, ops: range) -> list[tuple[int, int]]:
    """Bytes and time of every kept set of a run, by hand."""
    graph, life = pieces.graph, pieces.life
    mine = [d for d in range(len(life.names)) if life.producer[d] in ops and life.last_forward[d] < ops.stop]
    found = []
    for count in range(len(mine) + 1):
        for kept in combinations(mine, count):
            missing = [d for d in mine if d not in kept and life.first_use[d] < len(graph.ops)]
            lane: set[int] = set()
            while missing:
                i = int(life.producer[missing.pop()])
                if i not in lane:
                    lane.add(i)
                    missing += [d for d in pieces.inputs(i) if d in mine and d not in kept]
            if all(graph.ops[i].recomputable for i in lane):
                found.append((sum(int(life.nbytes[d]) for d in kept), sum(graph.ops[i].cost_ns for i in lane)))
    return found


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_menu_is_the_lower_hull_of_all_kept_sets(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=7))
    pieces = Pieces(graph, 4)
    i = data.draw(st.sampled_from(range(len(pieces))))
    j = data.draw(st.sampled_from(range(i + 1, len(pieces) + 1)))
    run = range(pieces.forward[i].start, pieces.forward[j - 1].stop)
    menu, everything = pieces.menu(i, j), every_dish(pieces, run)
    event(f"dishes: {len(menu)}")
    assert [dish.nbytes for dish in menu] == sorted({dish.nbytes for dish in menu}, reverse=True)
    for dish in menu:
        assert dish.cost_ns == sum(graph.ops[op].cost_ns for op in dish.lane)
        # With as few bytes nothing takes less time, but for the nanosecond that every op costs in the program besides its own.
        assert all(cost >= dish.cost_ns - len(run) for nbytes, cost in everything if nbytes <= dish.nbytes)
    for nbytes, cost in everything:
        assert cost >= _on_hull(menu, nbytes) - 2 * len(run) - 1


def _on_hull(menu: list[Dish], nbytes: int) -> float:
    """The time that mixing dishes takes for so many bytes."""
    if nbytes >= menu[0].nbytes:
        return menu[0].cost_ns
    return float(np.interp(nbytes, [dish.nbytes for dish in menu[::-1]], [dish.cost_ns for dish in menu[::-1]]))


def test_runs_that_look_alike_share_a_menu_and_others_do_not() -> None:
    graph = graphs.blocks(12)
    pieces = Pieces(graph, 100)
    assert len(pieces) >= 12
    inner = [i for i, ops in enumerate(pieces.forward) if [graph.ops[op].name[:2] for op in ops] == ["fa", "fm", "fc"]]
    first, second = (pieces.menu(i, i + 1) for i in inner[2:4])
    assert len(pieces._menus) == 1
    shift = pieces.forward[inner[3]].start - pieces.forward[inner[2]].start
    assert [tuple(op + shift for op in dish.lane) for dish in first] == [dish.lane for dish in second]
    assert len(first) == 2
    pieces.menu(inner[2], inner[4])
    assert len(pieces._menus) == 2


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


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_take_the_time_their_table_says_and_more_memory_is_never_dearer(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    blocks = Blocks(Pieces(graph, 100), data.draw(budgets(graph)), soon())
    assert blocks.complete
    costs = blocks._best[0]
    assert list(costs) == sorted(costs, reverse=True)
    plain = simulate(graph, keep_all(graph)).time_ns
    schedules = {room: blocks.schedule(room) for room in (*ROOMS, 1 + FINE)}
    event(f"schedules: {min(len({*schedules.values()} - {None}), 4)}")
    for room, schedule in schedules.items():
        cost = costs[round(room * blocks_module._ROOM)]
        assert (schedule is None) == np.isinf(cost)
        assert schedule is None or simulate(graph, schedule).time_ns <= plain + cost


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


def test_the_blocks_of_a_long_recurrent_net_grow_from_its_end_to_its_start() -> None:
    graph = recurrent(60)
    plain = simulate(graph, keep_all(graph))
    budget_bytes = plain.peak_bytes // 5
    blocks = Blocks(Pieces(graph, 100), budget_bytes, soon())
    schedules = {room: schedule for room in ROOMS if (schedule := blocks.schedule(room)) is not None}
    assert any(simulate(graph, schedule).peak_bytes <= budget_bytes for schedule in schedules.values())
    lengths, i, level = [], 0, blocks_module._ROOM
    while i < len(blocks.pieces):
        j, _, less = blocks._choice[i][int(blocks._chosen[i][level])]
        lengths.append(j - i)
        i, level = j, level - less
    assert max(lengths[: len(lengths) // 2]) >= 13  # without a trace of a state kept in between
    assert max(lengths[len(lengths) // 2 :]) <= 8
    assert max(lengths[-5:]) <= 3
    # As long as the graph is a chain, the table's count of memory is the simulator's but for rounding.
    for room, schedule in schedules.items():
        assert simulate(graph, schedule).peak_bytes <= (room * blocks_module._ROOM + 1 + len(blocks.pieces)) * blocks.unit


def test_a_budget_below_every_block_has_no_schedule_of_blocks() -> None:
    graph = recurrent(8)
    blocks = Blocks(Pieces(graph, 100), 3, soon())
    assert [blocks.schedule(room) for room in ROOMS] == [None] * len(ROOMS)


def test_a_menu_is_cut_short_at_so_many_dishes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"v{i}" for i in range(20)]
    forward = [graphs.op(f"f{i}", "x", name, (i + 1) ** 2) for i, name in enumerate(names)]
    forward.append(graphs.op("floss", " ".join(names), "loss", 1))
    backward = [graphs.op("b", f"{' '.join(names)} t", "g", 1)]
    graph = graphs.graph({"x": 1, "t": 1, "loss": 1, "g": 1, **dict.fromkeys(names, 8)}, forward, backward, "loss", "g")
    assert len(Pieces(graph, 1).menu(0, 1)) == pieces_module._DISHES
    monkeypatch.setattr(pieces_module, "_DISHES", 100)
    assert len(Pieces(graph, 1).menu(0, 1)) == 21


def test_no_time_no_table() -> None:
    assert not Blocks(Pieces(recurrent(8), 100), 100, time.monotonic() - 1).complete
