"""The picture of live memory: what stands on it, and that nothing lies on anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner import InputError, Plan
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.solution import Solution
from planner.report import timeline
from planner.report.stack import Stack
from planner.units import format_bytes
from tests.support import graphs
from tests.support.pictures import figures, is_png, is_svg, overlaps
from tests.support.sweeps import plan_of

PROVENANCE = Provenance("measured", "NVIDIA H200", module="A$very_long$Model", date="2026-11-28")


@pytest.mark.parametrize(
    "graph", [graphs.blocks(6), graphs.in_modules(), graphs.statistics()], ids=["blocks", "modules", "workspace"]
)
def test_pictures(graph: graphs.Graph, tmp_path: Path) -> None:
    plan = plan_of(graph, 0.9)
    timeline.plot(plan, tmp_path / "step.svg")
    assert is_svg(tmp_path / "step.svg")
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plan.plot(tmp_path / "step.gif")


def test_a_step_of_no_time_can_be_drawn(tmp_path: Path) -> None:
    free = graphs.graph({"x": 1, "a": 1, "t": 1}, [graphs.op("f", "x", "a", 0)], [], "a")
    plan = Plan(free, 10, 0, Solution("optimal", keep_all(free), 0, 0.0, "by hand"))
    plan.plot(tmp_path / "free.svg")
    assert is_svg(tmp_path / "free.svg")


def test_what_stands_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of(graphs.in_modules()), provenance=PROVENANCE)
    with figures(monkeypatch) as drawn:
        plan.plot(tmp_path / "step.svg")
    (figure,) = drawn
    title = figure.get_suptitle()
    assert all(part in title for part in ("A$very_long$Model", "NVIDIA H200", "2026-11-28", "measured"))
    panels = figure.axes
    budget = f"budget {format_bytes(plan.budget_bytes)}"
    assert len(panels) == 2 and all(budget in [text.get_text() for text in axes.texts] for axes in panels)
    stack = Stack(plan.graph, (keep_all(plan.graph), plan.solution.schedule))
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels[1:] == [layer.label for layer in reversed(stack.layers)]
    assert "kept: h.*.up" in labels and len({layer.color for layer in stack.layers}) == len(stack.layers)
    hatched = [[area.get_hatch() is not None for area in axes.collections] for axes in panels]
    assert not any(hatched[0]) and sum(hatched[1]) == 1


def test_twice_the_resolution_of_a_screen(tmp_path: Path) -> None:
    from PIL import Image

    plan_of(graphs.blocks(4)).plot(tmp_path / "step.png")
    assert is_png(tmp_path / "step.png")
    with Image.open(tmp_path / "step.png") as image:
        assert image.width >= 1840
        assert image.convert("RGB").getpixel((2, image.height // 2)) == (255, 255, 255)
    assert (tmp_path / "step.png").stat().st_size < 300_000


@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_nothing_lies_on_anything_else(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan_of(graphs.in_modules(), share), provenance=PROVENANCE)
    with figures(monkeypatch) as drawn:
        plan.plot(tmp_path / "step.svg")
    assert overlaps(drawn[0]) == []
