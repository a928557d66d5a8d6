"""Live memory over the time of the step as a picture, plain above planned."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.graph.live import spans
from planner.graph.modules import place_of
from planner.graph.planned import PlannedGraph
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import Timeline
from planner.report import picture
from planner.report.largest import Group, largest
from planner.report.stack import RECOMPUTE_COLOR, Layer, Stack
from planner.units import format_bytes, format_ns

_TOP, _WIDE = 5, 44
"""Number of groups of tensors that are named at the peak, and characters for each."""


def plot(plan: PlannedGraph, path: str | Path) -> None:
    """Draw live bytes over the time of the step, plain above planned, into a .png or .svg file.

    Raises:
        PlotMissingError: matplotlib (the extra `plot`) is not installed.
        InputError: another suffix, or the file cannot be written.
    """
    picture.check(path)
    with picture.style():
        drawn = picture.figure(10.4, 7.6)
        _Panels(plan, drawn).draw()
        picture.save(drawn, path)


class _Panels:
    """The plain step above the planned one, on the same axes; the budget in both."""

    def __init__(self, plan: PlannedGraph, drawn: Any) -> None:
        self.plan, self.drawn = plan, drawn
        self.unit, self.size = picture.bytes_unit(max(plan.plain.peak_bytes, plan.budget_bytes))
        self.clock, self.tick = picture.time_unit(plan.timeline.time_ns)
        self.steps = (("plain", keep_all(plan.graph), plan.plain), ("planned", plan.solution.schedule, plan.timeline))
        self.stack = Stack(plan.graph, [schedule for _, schedule, _ in self.steps])

    def draw(self) -> None:
        panels = self.drawn.subplots(2, sharex=True, sharey=True)
        for (name, schedule, timeline), axes in zip(self.steps, panels, strict=True):
            times = np.array([0, *accumulate(self.plan.graph.ops[i].cost_ns for i in schedule.steps)]) / self.tick
            self._layers(schedule, times, axes)
            self._recomputes(schedule, times, axes)
            self._marks(name, schedule, timeline, times, axes)
            self._largest(schedule, timeline, axes)
            axes.set_ylabel(f"live memory [{self.unit}]")
        panels[1].set_xlabel(f"time of the step [{self.clock}]")
        panels[0].set_ylim(0, 1.08 * max(self.plan.plain.peak_bytes, self.plan.budget_bytes) / self.size)
        panels[0].set_xlim(0, max(self.plan.plain.time_ns, self.plan.timeline.time_ns) / self.tick or 1)
        picture.title(self.drawn, "Live memory over a training step", self.plan.provenance)
        self._legend()

    def _layers(self, schedule: Schedule, times: NDArray[np.float64], axes: Any) -> None:
        """The stack, from the bottom up."""
        layers, num_steps = self.stack.layers, len(schedule.steps)
        change = np.zeros((len(layers), num_steps + 1), dtype=np.int64)
        for span in spans(self.plan.graph, schedule):
            if span.nbytes and span.start <= span.end:
                row = self.stack.layer_of(span)
                change[row, span.start] += span.nbytes
                change[row, span.end + 1] -= span.nbytes
        tops = np.cumsum(np.cumsum(change, axis=1)[:, :num_steps], axis=0) / self.size
        tops = np.concatenate([np.zeros((1, num_steps)), tops])
        tops = np.concatenate([tops, tops[:, -1:]], axis=1)  # the last step lasts until the end
        for layer, base, top in zip(layers, tops[:-1], tops[1:], strict=True):
            if (top > base).any():
                axes.fill_between(times, base, top, step="post", **_fill(layer))

    def _recomputes(self, schedule: Schedule, times: NDArray[np.float64], axes: Any) -> None:
        """A strip along the top: when ops run again, however little they hold."""
        runs = [(times[t], times[t + 1] - times[t]) for t in schedule.recomputes()]
        axes.broken_barh(runs, (0.97, 0.03), transform=axes.get_xaxis_transform(), facecolor=RECOMPUTE_COLOR, linewidth=0)

    def _marks(self, name: str, schedule: Schedule, timeline: Timeline, times: NDArray[np.float64], axes: Any) -> None:
        """The budget, the peak, and where the backward begins."""
        budget = self.plan.budget_bytes / self.size
        axes.axhline(budget, color="#000000", linestyle="--", linewidth=0.9)
        middle = (times[timeline.peak_step] + times[timeline.peak_step + 1]) / 2
        axes.plot(middle, timeline.peak_bytes / self.size, "v", color="#000000", markersize=6, clip_on=False)
        axes.axvline(times[timeline.boundary], color="#000000", linestyle=":", linewidth=1.0)
        label = f"budget {format_bytes(self.plan.budget_bytes)}"
        picture.note(axes, label, (0.0, budget), (4, 2), va="bottom")
        axes.annotate(
            "forward | backward",
            (times[timeline.boundary], 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7.5,
        )
        op = self.plan.graph.ops[schedule.steps[timeline.peak_step]]
        peak = f"peak {format_bytes(timeline.peak_bytes)} in {picture.shortened(f'{op.name} ({place_of(op)})', _WIDE + 12)}"
        axes.set_title(f"{name}: {peak}, {format_ns(timeline.time_ns)}", loc="left", pad=14)

    def _largest(self, schedule: Schedule, timeline: Timeline, axes: Any) -> None:
        """What holds most at the peak, beside the panel: below the legend in the upper one."""
        groups = largest(self.plan.graph, schedule, timeline.peak_step, _TOP)
        text = "\n".join(["largest at the peak (▼)", *(line for group in groups for line in _lines(group))])
        place = {"x": 1.01, "y": 0.0, "va": "bottom"} if timeline is self.steps[0][2] else {"x": 1.01, "y": 1.0, "va": "top"}
        axes.text(s=text, transform=axes.transAxes, fontsize=6.5, family="DejaVu Sans Mono", linespacing=1.15, **place)

    def _legend(self) -> None:
        """The layers as they lie: the topmost first."""
        from matplotlib.patches import Patch

        patches = [Patch(facecolor=RECOMPUTE_COLOR, label="ops run again (along the top)", linewidth=0)]
        for layer in reversed(self.stack.layers):
            patches.append(Patch(**_fill(layer), label=layer.label))
        where = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.03), "frameon": False, "fontsize": 7.5}
        self.drawn.axes[0].legend(handles=patches, handlelength=1.4, labelspacing=0.25, **where)


def _fill(layer: Layer) -> dict[str, Any]:
    """How matplotlib fills a layer."""
    hatch = {"hatch": "/////", "edgecolor": "#ffffff"} if layer.is_hatched else {}
    return {"facecolor": layer.color, "linewidth": 0, **hatch}


def _lines(group: Group) -> list[str]:
    """Two lines on the largest tensors: how much and what for, then where from."""
    times = f" = {group.count} x {format_bytes(group.nbytes)}" if group.count > 1 else ""
    what = group.part.value if group.place else group.name
    first = f"{format_bytes(group.count * group.nbytes)}{times}: {what}"
    where = f"{group.name}, {group.place}" if group.place else ""
    return [first, *([f"  {picture.shortened(where, _WIDE)}"] if where else [])]
