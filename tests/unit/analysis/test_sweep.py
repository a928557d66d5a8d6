"""Sweeps: points, knee, best, impossible ranges, the table, the picture, the file, and a small real model measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from planner import BudgetError, InfeasibleBudgetError, InputError, NoScheduleFoundError, PlanFileError, PlotMissingError, Sweep
from planner.analysis.references import module_checkpoints, references
from planner.analysis.sweep import MeasuredPoint
from planner.graph.floor import floor
from planner.graph.schedule import check, keep_all
from planner.graph.simulate import simulate
from planner.limits import Limits
from planner.report.tables import WIDTH
from planner.results import plan_file
from tests.support import graphs
from tests.support.missing import hide
from tests.support.models import Attention, Wrapped
from tests.support.pictures import is_png, is_svg
from tests.support.strategies import training_graphs
from tests.support.sweeps import sweep_of

PLAIN = simulate(graphs.blocks(8), keep_all(graphs.blocks(8))).peak_bytes


@pytest.fixture(scope="module")
def swept() -> Sweep:
    return sweep_of(graphs.blocks(8), points=8, limits=Limits(5.0))


def test_points_go_up_to_the_plain_peak_and_never_get_dearer(swept: Sweep) -> None:
    assert [point.budget_bytes for point in swept.points] == sorted({point.budget_bytes for point in swept.points})
    assert swept.points[-1].budget_bytes == PLAIN and swept.points[-1].overhead == 0
    times = [point.time_ns for point in swept.points]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    for point in swept.points:
        assert point.bound_ns <= point.time_ns and point.peak_bytes <= point.budget_bytes
        assert swept.plan(point).peak_bytes == point.peak_bytes
        assert swept.plan(point).overhead == pytest.approx(point.overhead)
    assert swept.floor_bytes == floor(swept.graph)[0] <= swept.points[0].peak_bytes
    assert swept.floor_op in {op.name for op in swept.graph.ops}


@settings(deadline=None, max_examples=25)
@given(training_graphs(max_forward=6), st.integers(1, 5))
def test_a_range_always_has_plans(graph: graphs.Graph, points: int) -> None:
    swept = sweep_of(graph, points=points, limits=Limits(5.0))
    assert 1 <= len(swept.points) <= points and not swept.infeasible
    assert swept.points[-1].overhead == 0
    assert swept.knee_point in swept.points
    assert str(swept)


def test_the_knee_is_below_the_straight_line(swept: Sweep) -> None:
    first, last, knee = swept.points[0], swept.points[-1], swept.knee_point
    assert first.peak_bytes < knee.peak_bytes < last.peak_bytes
    share = (knee.peak_bytes - first.peak_bytes) / (last.peak_bytes - first.peak_bytes)
    assert knee.time_ns < first.time_ns + share * (last.time_ns - first.time_ns)
    assert swept.knee.budget_bytes == knee.budget_bytes


def test_best_by_budget_and_by_overhead(swept: Sweep) -> None:
    middle = swept.points[4]
    assert swept.best(budget=middle.budget_bytes).budget_bytes == middle.budget_bytes
    assert swept.best(budget=middle.budget_bytes + 1).budget_bytes == middle.budget_bytes
    assert swept.best(budget=1.0).overhead == 0
    assert swept.best(max_overhead=0).overhead == 0
    cheap = swept.best(max_overhead=0.1)
    assert cheap.overhead <= 0.1
    assert all(point.overhead > 0.1 for point in swept.points if point.peak_bytes < cheap.peak_bytes)


def test_best_says_why_there_is_none(swept: Sweep) -> None:
    with pytest.raises(InfeasibleBudgetError, match="least any schedule"):
        swept.best(budget=1)
    high = sweep_of(graphs.blocks(8), [0.8, 1.0])
    with pytest.raises(NoScheduleFoundError, match="the smallest that has a plan in this sweep"):
        high.best(budget=0.7)
    with pytest.raises(NoScheduleFoundError, match="the least is"):
        sweep_of(graphs.blocks(8), [0.7]).best(max_overhead=0)
    for wrong in ({}, {"budget": 1, "max_overhead": 1.0}, {"max_overhead": -1}, {"max_overhead": math.nan}):
        with pytest.raises(InputError):
            swept.best(**wrong)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budgets": []}, "empty"),
        ({"points": 0}, "at least 1"),
        ({"points": 2.5}, "at least 1"),
        ({"low": 100, "high": 50}, "low 100 B is above high 50 B"),
        ({"budgets": [0]}, "not positive"),
        ({"budgets": [-5]}, "cannot|not positive"),
        ({"low": math.nan}, "nan"),
        ({"budgets": [0.5, math.nan]}, "nan"),
        ({"budgets": [math.inf]}, "inf"),
        ({"high": "1GiB"}, "above the plain step's peak"),
        ({"budgets": [PLAIN + 1]}, "above the plain step's peak"),
        ({"budgets": ["soon"]}, "soon"),
        ({"budgets": "6GiB"}, "list of budgets"),
        ({"budgets": 0.5}, "list of budgets"),
        ({"budgets": [0.5], "low": 0.1}, "either"),
        ({"budgets": [1e-9]}, "less than a byte"),
    ],
)
def test_impossible_ranges_are_one_budget_error(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        sweep_of(graphs.blocks(8), **asked)


def test_no_plan_at_all_is_the_error_of_the_largest_budget() -> None:
    with pytest.raises(InfeasibleBudgetError, match="2 B"):
        sweep_of(graphs.blocks(8), [1, 2])


def test_the_former_name_of_the_infeasible_points_works(swept: Sweep) -> None:
    with pytest.warns(DeprecationWarning, match=r"Sweep\.infeasible") as caught:
        assert swept.misses is swept.infeasible
    assert caught[0].filename == __file__


def test_the_table_tells_infeasible_points_knee_and_reference_schedules(swept: Sweep) -> None:
    text = str(sweep_of(graphs.blocks(8), [1, 0.6, 0.8, 1.0]))
    for part in ("InfeasibleBudgetError", "<- knee", "floor", "sqrt(n)", "per block", "100.0%", "for this backward order"):
        assert part in text
    assert "whole modules" not in text, "a graph without module paths"
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_file_is_the_identity_sorted_and_checked(swept: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    swept.save(path)
    assert Sweep.load(path) == swept
    text = path.read_text()
    document = json.loads(text)
    assert list(document) == sorted(document) and list(document["sweep"]) == sorted(document["sweep"])
    assert text.count('"steps"') == sum('"steps"' in line for line in text.splitlines()), "one point a line"
    assert plan_file.load_graph(path) == swept.graph
    with pytest.raises(InputError, match="no model"):
        Sweep.load(path).verify()

    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps(document | {"schema": 99}))
    with pytest.raises(PlanFileError, match="schema 99"):
        Sweep.load(newer)
    for spoil in (
        {"points": []},
        {"points": [{}]},
        {"misses": 3},
        {"points": [document["sweep"]["points"][0] | {"steps": [0]}]},
    ):
        newer.write_text(json.dumps(document | {"sweep": document["sweep"] | spoil}))
        with pytest.raises(PlanFileError, match="sweep"):
            Sweep.load(newer)
    with pytest.raises(PlanFileError, match="cannot read"):
        Sweep.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot write"):
        swept.save(tmp_path / "none" / "sweep.json")


def test_measurements_of_earlier_files_have_no_spread(swept: Sweep, tmp_path: Path) -> None:
    point = swept.points[0]
    timed = MeasuredPoint(point.budget_bytes, point.peak_bytes, 1.2, True, (1.1, 1.4))
    seen, path = replace(swept, measured=(timed, MeasuredPoint(point.budget_bytes, 9, None, False))), tmp_path / "sweep.json"
    seen.save(path)
    assert Sweep.load(path) == seen
    document = json.loads(path.read_text())
    document["sweep"]["measured"] = [row[:4] for row in document["sweep"]["measured"]]
    path.write_text(json.dumps(document))
    assert Sweep.load(path).measured == tuple(replace(found, time_spread=None) for found in seen.measured)
    document["sweep"]["measured"] = [[1, 2, 3.0, True, 4.0]]
    path.write_text(json.dumps(document))
    with pytest.raises(PlanFileError, match="5 fields"):
        Sweep.load(path)


def test_the_picture(swept: Sweep, tmp_path: Path) -> None:
    swept.plot(tmp_path / "sweep.png")
    swept.plot(tmp_path / "sweep.svg")
    assert is_png(tmp_path / "sweep.png") and is_svg(tmp_path / "sweep.svg")
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        swept.plot(tmp_path / "sweep.jpg")
    with pytest.raises(InputError, match="cannot write"):
        swept.plot(tmp_path / "none" / "sweep.png")


def test_one_point_can_be_drawn(tmp_path: Path) -> None:
    sweep_of(graphs.chain(), points=1).plot(tmp_path / "one.png")
    assert is_png(tmp_path / "one.png")


def test_a_missing_matplotlib_names_the_extra(swept: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "matplotlib")
    with pytest.raises(PlotMissingError, match=r"checkpoint-planner\[plot\]"):
        swept.plot(tmp_path / "sweep.png")


def test_whole_modules_run_again_up_to_what_is_needed() -> None:
    graph = graphs.in_modules()
    schedule = module_checkpoints(graph)
    assert schedule is not None
    check(graph, schedule)
    again = [graph.ops[schedule.steps[t]].name for t in schedule.recomputes()]
    # c_0 .. c_3 are read outside of their modules, and kept; the op that writes them is not needed again.
    assert again == ["fa3", "fa2", "fa1", "fa0"]
    assert module_checkpoints(graphs.blocks(3)) is None


@settings(deadline=None, max_examples=40)
@given(training_graphs(max_forward=8))
def test_references_are_valid_schedules(graph: graphs.Graph) -> None:
    plain = simulate(graph, keep_all(graph))
    assert all(reference.time_ns >= plain.time_ns for reference in references(graph))


def test_a_real_model_is_captured_once_and_measured_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from planner import captured

    torch.manual_seed(0)
    model = Wrapped(nn.Sequential(*[Attention(64, 4, 0.1) for _ in range(4)])).train()
    x = torch.randn(4, 64, 64)
    captures: list[Any] = []
    capture = captured.capture
    monkeypatch.setattr(captured, "capture", lambda *args, **kwargs: (captures.append(args), capture(*args, **kwargs))[1])
    swept = planner.sweep(model, None, (x,), points=6, costs="estimate", effort=1.0)
    seen = swept.verify(3, rounds=1)
    assert len(captures) == 1
    assert not swept.measured and len(seen.measured) == 3
    assert [found.budget_bytes for found in seen.measured][-1] == seen.points[-1].budget_bytes
    by_budget = {point.budget_bytes: point for point in seen.points}
    for found in seen.measured:
        predicted = by_budget[found.budget_bytes].peak_bytes
        assert found.exact and found.peak_bytes <= found.budget_bytes
        assert abs(found.peak_bytes - predicted) <= 0.01 * predicted
    seen.plot(tmp_path / "measured.png")
    assert is_png(tmp_path / "measured.png")
    seen.save(tmp_path / "measured.json")
    assert Sweep.load(tmp_path / "measured.json") == seen
    assert "measured peak" in str(seen)
    with pytest.raises(InputError, match="at least 1"):
        swept.verify(0)
    planned = planner.apply(swept.knee, model, (x,))
    assert planned.plan == swept.knee


def test_a_model_with_an_impossible_range_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from planner import captured

    monkeypatch.setattr(captured, "capture", lambda *args, **kwargs: pytest.fail("captured"))
    for asked in ({"budgets": []}, {"low": math.nan}, {"points": 0}):
        with pytest.raises(BudgetError):
            planner.sweep(nn.Linear(2, 2), **asked)
