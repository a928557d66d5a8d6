"""The layers hold what `simulate` says is live, and their colours can be told apart by everyone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.graph.live import spans
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.report import stack
from planner.report.stack import NUM_MODULES, OTHER, Stack
from tests.support import graphs
from tests.support.strategies import schedules, training_graphs
from tests.support.sweeps import plan_of

VISION = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}
"""What is seen of linear RGB. Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
deficiency", IEEE TVCG 15(6), 2009, severity 1.0."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
"""sRGB (IEC 61966-2-1), linear, to CIE XYZ."""


def lab(color: str, vision: str) -> np.ndarray:
    """CIELAB of "#rrggbb" as it is seen."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(VISION[vision]) @ linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_can_be_told_apart(vision: str) -> None:
    """2.3 is just noticeable (Mahy, Van Eycken and Oosterlinck 1994)."""
    colors = [*stack._COLORS.values(), *stack._MODULE_COLORS, stack._OTHER_COLOR]
    assert min(np.linalg.norm(lab(a, vision) - lab(b, vision)) for a, b in combinations(colors, 2)) > 6 * 2.3


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_layers_sum_to_the_simulated_bytes(data: st.DataObject) -> None:
    graph = data.draw(training_graphs(max_forward=8))
    schedule = data.draw(schedules(graph))
    found = Stack(graph, (keep_all(graph), schedule))
    live = np.zeros((len(found.layers), len(schedule.steps)), dtype=np.int64)
    for span in spans(graph, schedule):
        if span.nbytes:
            live[found.layer_of(span), span.start : span.end + 1] += span.nbytes
    assert live.sum(axis=0).tolist() == list(simulate(graph, schedule).live_bytes)


def test_kinds_of_modules_are_layers_of_their_own() -> None:
    plan = plan_of(graphs.in_modules())
    found = Stack(plan.graph, (keep_all(plan.graph), plan.solution.schedule))
    assert [layer.module for layer in found.layers if layer.module] == ["h.*.up", "h.*.down"]
    assert [layer.label for layer in found.layers if layer.is_hatched] == ["recomputed"]


def test_the_smallest_share_a_layer() -> None:
    graph = graphs.many_modules(NUM_MODULES + 3)
    found = Stack(graph, (keep_all(graph),))
    kept = [layer.module for layer in found.layers if layer.module]
    assert len(kept) == NUM_MODULES + 1 and kept[-1] == OTHER
    assert kept[0] == f"m_{chr(ord('a') + NUM_MODULES + 2)}", "the largest first"
