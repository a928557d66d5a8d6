"""Rows by module, equal blocks as one, ranks, prices; and all of it without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from planner import Plan
from planner.analysis.explain import explain
from planner.graph.modules import block_of, fold, module_of
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.source import Source
from planner.solver.solve import Solver
from tests.support import graphs
from tests.support.sweeps import plan_of


def test_module_paths() -> None:
    assert module_of(graphs.op("f", "", "", source=Source("h.0.mlp", "model.py", 3))) == "h.0.mlp"
    assert module_of(graphs.op("f", "", "", source=Source(file="model.py", line=3))) == "(top)"
    assert module_of(graphs.op("f", "", "")) == "(top)"
    assert block_of("encoder.layers.10.mlp.0") == "encoder.layers.10"
    assert block_of("mlp2.norm1") == ""
    assert block_of("3") == "3"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({}, {}),
        ({"a": 1, "b": 1}, {"a": ("a",), "b": ("b",)}),
        ({"h.0-3.x": 1, "h.1.x": 1, "h.2.x": 1}, {"h.0-3.x": ("h.0-3.x",), "h.1-2.x": ("h.1.x", "h.2.x")}),
        ({"h.01.x": 1, "k.1,2.x": 1}, {"h.01.x": ("h.01.x",), "k.1,2.x": ("k.1,2.x",)}),
        ({"h.0.x": 1, "h.1.x": 1, "h.2.x": 2}, {"h.0-1.x": ("h.0.x", "h.1.x"), "h.2.x": ("h.2.x",)}),
        ({"h.0.x": 1, "h.2.x": 1, "h.3.x": 1}, {"h.0,2-3.x": ("h.0.x", "h.2.x", "h.3.x")}),
        ({"h.9.x": 1, "h.10.x": 1, "h.9.y": 1}, {"h.9-10.x": ("h.9.x", "h.10.x"), "h.9.y": ("h.9.y",)}),
        (
            {"s.0.b.0.x": 1, "s.0.b.1.x": 1, "s.1.b.0.x": 2, "s.1.b.1.x": 2},
            {"s.0.b.0-1.x": ("s.0.b.0.x", "s.0.b.1.x"), "s.1.b.0-1.x": ("s.1.b.0.x", "s.1.b.1.x")},
        ),
        (
            {f"s.{i}.b.{j}": 1 for i in range(2) for j in range(2)},
            {"s.0-1.b.0-1": ("s.0.b.0", "s.1.b.0", "s.0.b.1", "s.1.b.1")},
        ),
        ({"conv1": 1, "conv2": 1}, {"conv1": ("conv1",), "conv2": ("conv2",)}),
    ],
)
def test_rows_that_differ_in_a_number_are_folded(rows: dict[str, int], expected: dict[str, tuple[str, ...]]) -> None:
    assert fold(rows) == expected


def test_nothing_is_counted_twice_or_lost() -> None:
    plan = plan_of(graphs.in_modules(), 0.7)
    rows = explain(plan, prices=False).rows
    outputs = set(plan.graph.forward_outputs)
    saved, wanted = set(plan.timeline.saved) - outputs, set(plan.plain.saved) - outputs
    assert sum(row.kept_bytes for row in rows) == sum(plan.graph.value[name].nbytes for name in saved)
    assert sum(row.freed_bytes for row in rows) == sum(plan.graph.value[name].nbytes for name in wanted - saved)
    assert sum(row.recomputed_ns for row in rows) == plan.timeline.time_ns - plan.plain.time_ns


def test_a_row_says_why() -> None:
    plan = plan_of(graphs.in_modules(), 0.75)
    explained = plan.explain(prices=False)
    up = [row for row in explained.rows if row.label.endswith(".up")]
    down = [row for row in explained.rows if row.label.endswith(".down")]
    # a 8 bytes in 3 ns, c 4 bytes in 4 ns: the first frees more a ns, and goes first
    assert {row.rank for row in up} == {1} and {row.rank for row in down} == {2}
    assert up[0].rate == pytest.approx(8 / 3) and down[0].rate == pytest.approx(1)
    assert any(row.freed_bytes for row in up) and not any(row.freed_bytes for row in down)
    assert sum(row.count for row in up) == 4
    text = str(explained)
    assert "h.0-3.down (4x)" in text and "frees this much" in text and "would free this much" in text
    assert "the next" not in text


def test_prices_are_those_of_the_neighbouring_budgets() -> None:
    graph = graphs.blocks(8)
    plan = plan_of(graph, 0.7)
    explained = plan.explain(effort=5.0)
    more, less = explained.more, explained.less
    assert more is not None and less is not None
    assert more.saved_ns is not None and less.saved_ns is not None
    assert more.budget_bytes - plan.budget_bytes == plan.budget_bytes // 10 == plan.budget_bytes - less.budget_bytes
    assert more.saved_ns >= 0 >= less.saved_ns and more.saved_ns - less.saved_ns > 0
    exact = simulate(graph, Solver(graph).solve(more.budget_bytes).schedule).time_ns
    assert plan.timeline.time_ns - exact == more.saved_ns
    assert "would save" in str(explained) and "of the plain step" in str(explained)


def test_prices_at_the_ends() -> None:
    graph = graphs.blocks(6)
    full = plan_of(graph, 1.0).explain()
    assert full.more is None and "more memory buys nothing" in str(full)
    lowest = Solver(graph).lowest_peak()
    tight = Plan(graph, lowest, 0, Solver(graph).solve(lowest)).explain()
    assert tight.less is not None and tight.less.saved_ns is None
    assert "cannot be spared" in str(tight)


def test_a_plan_without_modules_is_explained_too() -> None:
    plan = plan_of(graphs.dropout(), 0.95)
    assert "(top)" in str(plan.explain())


def test_the_plain_plan_recomputes_nothing() -> None:
    plan = plan_of(graphs.blocks(4), 1.0)
    assert plan.solution.schedule == keep_all(plan.graph)
    assert all(row.recomputed_ns == 0 and row.freed_bytes == 0 for row in plan.explain(prices=False).rows)


def test_explaining_needs_no_torch(tmp_path: Path) -> None:
    plan_of(graphs.in_modules()).save(tmp_path / "plan.json")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from planner import Plan, Sweep\n"
        "plan = Plan.load(sys.argv[1]); print(plan.explain()); plan.perfetto(sys.argv[2]); plan.plot(sys.argv[3])"
    )
    run = [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("plan.json", "trace.json", "step.png"))]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "freed per ms" in done.stdout and (tmp_path / "step.png").stat().st_size > 1000
