"""The picture of a sweep: labels in place, rivals beside plans at their peak, and nothing on anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.analysis.references import references
from planner.analysis.sweep import MeasuredPoint
from planner.graph.provenance import Provenance
from planner.report.sweep_table import suggestion
from planner.results.sweep import Sweep
from planner.units import format_bytes
from tests.support import graphs
from tests.support.pictures import figures, is_svg, overlaps
from tests.support.sweeps import sweep_of


@pytest.fixture(scope="module")
def swept() -> Sweep:
    """Two measured points, one of them timed often enough to have a spread."""
    made = sweep_of(
        graphs.in_modules(), points=6, provenance=Provenance("measured", "NVIDIA H200", module="GPT", date="2026-11-28")
    )
    first, last = made.points[0], made.points[-1]
    timed = MeasuredPoint(first.budget_bytes, first.peak_bytes, 1.2, True, (1.1, 1.4))
    return replace(made, measured=(timed, MeasuredPoint(last.budget_bytes, last.peak_bytes, 1.0, True)))


@pytest.fixture(scope="module")
def figure(swept: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("pictures") / "sweep.svg"
    with pytest.MonkeyPatch.context() as monkeypatch, figures(monkeypatch) as drawn:
        swept.plot(path)
    assert is_svg(path)
    return drawn[0]


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_what_stands_on_it(swept: Sweep, figure: Any) -> None:
    found = texts(figure)
    assert f"suggested: {suggestion(swept)}" in found and "of the plain step's peak [%]" in found
    floor = f"no schedule fits below {format_bytes(swept.floor_bytes)}"
    assert any(text.startswith(floor) and swept.floor_op in text for text in found)
    assert all(part in figure.get_suptitle() for part in ("GPT", "NVIDIA H200", "2026-11-28"))


def test_the_side_where_nothing_fits_is_shaded(swept: Sweep, figure: Any) -> None:
    axes = figure.axes[0]
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches)
    lowest = min(point.peak_bytes for point in swept.points)
    assert spans == [(axes.get_xlim()[0], swept.floor_bytes), (swept.floor_bytes, lowest)]


def test_rivals_stand_beside_a_plan_that_peaks_no_higher(swept: Sweep, figure: Any) -> None:
    rivals, axes = references(swept.graph), figure.axes[1]
    assert len(axes.get_yticklabels()) == len(rivals) > 3
    plain = swept.plain.time_ns
    for row, rival in enumerate(rivals):
        own = [float(x) for line in axes.lines for x, y in [line.get_xydata()[0]] if y == row and line.get_color() == "#0072b2"]
        fitting = [point.time_ns for point in swept.points if point.peak_bytes <= rival.peak_bytes]
        assert own == ([pytest.approx((min(fitting) / plain - 1) * 100)] if fitting else [])
        said = f"{rival.time_ns / plain - 1:+.1%} against"
        assert any(text.startswith(said) for text in texts(figure))


def test_only_what_has_a_spread_is_drawn_as_measured(swept: Sweep, figure: Any, tmp_path: Path) -> None:
    (bars,) = figure.axes[0].containers
    (x, y), plain = bars.lines[0].get_xydata()[0], swept.plain.time_ns
    assert len(bars.lines[0].get_xydata()) == 1
    assert (x, y) == (swept.points[0].peak_bytes, pytest.approx(1.2 * plain))
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([1.1 * plain, 1.4 * plain])


def test_nothing_lies_on_anything_else(figure: Any) -> None:
    assert overlaps(figure) == []


@pytest.mark.parametrize(
    "graph", [graphs.blocks(6), graphs.chain(), graphs.many_modules(9)], ids=["blocks", "chain", "modules"]
)
def test_nothing_lies_on_anything_else_in_others(graph: graphs.Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with figures(monkeypatch) as drawn:
        sweep_of(graph, points=5).plot(tmp_path / "sweep.svg")
    assert overlaps(drawn[0]) == []
