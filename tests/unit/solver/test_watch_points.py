from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks.solver import load
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import Simulator, simulate
from planner.solver.certificate import Certificate
from planner.solver.relaxation import SCALE, Relaxation
from planner.solver.solve import solve
from planner.solver.watch_points import RelaxationWithWatchPoints, WatchPoints
from planner.solver.work import Work
from tests.support import graphs
from tests.support.solvers import optimum
from tests.support.strategies import budgets, training_graphs


def shared(count: int) -> Graph:
    """Every step of the forward and of the backward reads one large value, and after each of the backward's comes a spike."""
    steps = range(count)
    forward = [graphs.op("fe", "x", "e", 3)]
    forward += [graphs.op(f"f{i}", f"e h{i - 1}" if i else "e", f"h{i}", 5) for i in steps]
    forward.append(graphs.op("floss", f"h{count - 1}", "loss", 1))
    backward = []
    for i in reversed(steps):
        backward.append(graphs.op(f"b{i}", f"e h{i} {f'g{i + 1}' if i + 1 < count else 't'}", f"g{i}", 5))
        backward.append(graphs.op(f"s{i}", f"g{i}", f"k{i}", 2, workspace=18))
    sizes = {"x": 1, "t": 1, "loss": 1, "e": 20}
    for i in steps:
        sizes |= {f"h{i}": 2, f"g{i}": 1, f"k{i}": 1}
    return graphs.graph(sizes, forward, backward, "loss", "g0")


def watch_points(graph: Graph) -> WatchPoints:
    return WatchPoints(graph, Simulator(graph).run(range(len(graph.ops))).live_bytes)


def bound(program: Relaxation, graph: Graph, budget_bytes: int, *, relax: bool = False) -> float:
    """The time, in ns, that the program proves."""
    program.model.upper(program.budget, float(budget_bytes))
    answer = program.model.solve(Work(), relax=relax)
    return simulate(graph, keep_all(graph)).time_ns * (1 + answer.bound / SCALE)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_watch_points_anywhere_are_a_bound_and_no_weaker_than_the_cuts_alone(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=5))
    budget_bytes = data.draw(budgets(graph))
    somewhere = st.sampled_from(range(1, len(graph.ops))) | st.sampled_from(graph.backward_ops)
    cuts = sorted(data.draw(st.sets(somewhere, min_size=1, max_size=3)))
    loose = [name for op in graph.ops[: graph.num_forward_ops] if op.recomputable for name in op.writes]
    loose = [name for name in loose if name not in graph.pinned]
    heavy = sorted(data.draw(st.sets(st.sampled_from(loose), min_size=1, max_size=2))) if loose else []
    between = [p for p in range(cuts[0], len(graph.ops)) if data.draw(st.booleans())]
    watched = RelaxationWithWatchPoints(graph, cuts, 1.0, heavy, between)
    with_watch_points = bound(watched, graph, budget_bytes)
    without = bound(Relaxation(graph, cuts, 1.0), graph, budget_bytes, relax=True)
    event(f"heavy: {len(heavy)}, stronger: {with_watch_points > without + 1e-6}")
    assert with_watch_points >= without - 1e-3
    assert with_watch_points <= optimum(graph, budget_bytes) + 1e-3


def test_nothing_is_said_of_what_only_reruns_would_read() -> None:
    """A mask that cannot be made again is dead once its reader has run, unless that is to run again."""
    forward = [graphs.op("fe", "x", "e", 3), graphs.op("fm", "x", "m", 1, recomputable=False), graphs.op("fh", "e m", "h", 5)]
    forward.append(graphs.op("floss", "h", "loss", 1))
    backward = [graphs.op("b", "e h t", "g", 5), graphs.op("s", "g e", "k", 2, workspace=9)]
    sizes = {"x": 1, "t": 1, "loss": 1, "e": 4, "m": 9, "h": 9, "g": 1, "k": 1}
    graph = graphs.graph(sizes, forward, backward, "loss", "k")
    budget_bytes, first = simulate(graph, keep_all(graph)).peak_bytes, graph.num_forward_ops
    plain = simulate(graph, keep_all(graph)).time_ns
    assert bound(RelaxationWithWatchPoints(graph, [first], 1.0, ["e"], [first + 1]), graph, budget_bytes) == plain


def crossing() -> Graph:
    """Two values are read late; in the middle there is room for neither, at the ends for both."""
    forward = [graphs.op("fa", "x", "a", 3), graphs.op("fe", "a", "e", 3), graphs.op("fh", "e", "h", 5)]
    forward.append(graphs.op("floss", "h", "loss", 1))
    backward = [graphs.op("b3", "h t", "g3", 1), graphs.op("b2", "g3", "g2", 1, workspace=12), graphs.op("b1", "g2", "g1", 1)]
    backward.append(graphs.op("b0", "g1 a e", "g0", 1))
    sizes = {"x": 1, "t": 1, "loss": 1, "a": 4, "e": 4, "h": 2, "g3": 1, "g2": 1, "g1": 1, "g0": 1}
    return graphs.graph(sizes, forward, backward, "loss", "g0")


@pytest.mark.parametrize("budget_bytes", range(17, 30))
def test_between_two_cuts_a_value_may_go_and_come_back(budget_bytes: int) -> None:
    graph = crossing()
    first = graph.num_forward_ops
    best, plain = optimum(graph, budget_bytes), simulate(graph, keep_all(graph))
    found = bound(RelaxationWithWatchPoints(graph, [first, first + 3], 1.0, ["e"], [first + 1, first + 2]), graph, budget_bytes)
    assert plain.time_ns <= found <= best + 1e-3
    assert (found > plain.time_ns + 0.5) == (budget_bytes < plain.peak_bytes)


def test_a_value_that_must_go_after_every_read_is_paid_for_every_time() -> None:
    graph = shared(3)
    budget_bytes = 32
    plain = simulate(graph, keep_all(graph)).time_ns
    first = graph.num_forward_ops
    after = range(first + 1, len(graph.ops))
    one_cut = bound(Relaxation(graph, [first], 1.0), graph, budget_bytes)
    watched = bound(RelaxationWithWatchPoints(graph, [first], 1.0, ["e"], after), graph, budget_bytes)
    assert plain <= one_cut < watched == pytest.approx(optimum(graph, budget_bytes)) == plain + 2 * 3


def test_the_certificate_watches_heavy_values_between_its_cuts() -> None:
    graph = shared(12)
    budget_bytes = 50
    assert watch_points(graph).heavy == ("e",)
    solution = solve(graph, budget_bytes)
    assert solution.status == "optimal"
    assert solution.schedule.steps.count(0) >= 6
    blind = Certificate(graph)
    blind.watch_points.heavy = ()
    cut = blind.cuts.ranked(budget_bytes)[0]
    before = simulate(graph, keep_all(graph)).time_ns
    unwatched = blind.bound(budget_bytes, (cut,), Work(), relax=False).time_ns
    assert unwatched - before < 0.7 * (solution.bound_ns - before)


def test_where_nothing_is_heavy_nothing_is_watched() -> None:
    graph = load("unet-4", gradients=True)
    watched = watch_points(graph)
    assert watched.heavy == ()
    assert watched.after(graph.num_forward_ops, 1) == () and watched.middle(graph.num_forward_ops, 1) == []


def test_watch_points_are_where_the_plain_step_is_over_the_budget_and_the_second_cut_reads_nothing_heavy() -> None:
    graph = shared(12)
    watched, live = watch_points(graph), simulate(graph, keep_all(graph)).live_bytes
    for budget_bytes in (40, 50, 60):
        ops = watched.after(graph.num_forward_ops, budget_bytes)
        assert ops and all(live[p] > budget_bytes for p in ops)
        (middle,) = watched.middle(graph.num_forward_ops, budget_bytes)
        assert middle in ops and "e" not in graph.ops[middle].reads
