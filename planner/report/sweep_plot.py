"""A sweep as a picture: peak memory against step time, and below it rivals beside the plan at their peak."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from planner.analysis.references import EVERY, Reference
from planner.analysis.sweep import SweptGraph
from planner.report import picture
from planner.report.sweep_table import suggestion
from planner.units import format_bytes

_PLANS, _BOUND, _MEASURED, _KNEE = "#0072b2", "#e69f00", "#000000", "#d55e00"
_MARKERS = {
    "per block": ("s", "#cc79a7"),
    "sqrt(n)": ("D", "#009e73"),
    EVERY: ("x", picture.GREY),
    "whole modules": ("^", "#56b4e9"),
}
_INFEASIBLE, _UNKNOWN = "#dcdcdc", "#f2f2f2"
_HEIGHT = 5.6
"""Inches of the upper part."""
_RELATIVE = {"left": 0.0, "center": 0.5, "right": 1.0}
_LEFT, _BELOW, _ABOVE = 0.12, 0.2, 0.06
"""Room beside the curve, as shares of the axes' range: for the side where nothing fits, for labels, for markers."""


def plot(sweep: SweptGraph, references: Iterable[Reference], path: str | Path) -> None:
    """Draw the plans, the certificate's bound, reference schedules, the knee, the floor, and what was measured.

    Raises:
        PlotMissingError, InputError: as `Sweep.plot`.
    """
    picture.check(path)
    rivals = tuple(references)
    with picture.style():
        below = (0.9 + 0.24 * len(rivals)) if rivals else 0.0
        drawn = picture.figure(9.2, _HEIGHT + below)
        upper, *lower = drawn.subfigures(2, height_ratios=[_HEIGHT, below]) if rivals else [drawn]
        _Curve(sweep, rivals, upper.add_subplot()).draw()
        for each in lower:
            _at_their_peaks(sweep, rivals, each.add_subplot())
        picture.title(drawn, "Peak memory against step time", sweep.provenance)
        picture.save(drawn, path)


class _Curve:
    """Bytes to the right, above as a share of the plain peak; step time up, on the right over that of the plain step."""

    def __init__(self, sweep: SweptGraph, references: Sequence[Reference], axes: Any) -> None:
        self.sweep, self.references, self.axes, self.plain = sweep, references, axes, sweep.plain
        self.memory, self._bytes = picture.bytes_unit(self.plain.peak_bytes)
        slowest = max(point.time_ns for point in sweep.points)
        self.time, self._ns = picture.time_unit(slowest)

    def x(self, nbytes: float) -> float:
        return nbytes / self._bytes

    def y(self, ns: float) -> float:
        return ns / self._ns

    def draw(self) -> None:
        self._curves()
        self._rivals()
        self._measured()
        self._limits()
        self._infeasible()
        self._knee()
        axes = self.axes
        axes.set_xlabel(f"peak of the step [{self.memory}]")
        axes.set_ylabel(f"step time [{self.time}]")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        plain_x, plain_y = max(self.x(self.plain.peak_bytes), 1e-9), max(self.y(self.plain.time_ns), 1e-9)
        right = axes.secondary_yaxis("right", functions=(lambda y: (y / plain_y - 1) * 100, lambda p: (p / 100 + 1) * plain_y))
        right.set_ylabel("over the plain step [%]")
        top = axes.secondary_xaxis("top", functions=(lambda x: x / plain_x * 100, lambda p: p / 100 * plain_x))
        top.set_xlabel("of the plain step's peak [%]")
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)

    def _curves(self) -> None:
        points, axes = self.sweep.points, self.axes
        plans = [self.x(point.peak_bytes) for point in points]
        axes.plot(plans, [self.y(point.time_ns) for point in points], "o-", color=_PLANS, markersize=4, label="plans", zorder=4)
        capacity = [self.x(point.budget_bytes - point.margin_bytes) for point in points]
        bound = [self.y(min(point.bound_ns, point.time_ns)) for point in points]
        label = "bound: no schedule is faster"
        axes.plot(capacity, bound, "--", color=_BOUND, linewidth=1.6, label=label, zorder=5)
        plain = (self.x(self.plain.peak_bytes), self.y(self.plain.time_ns))
        axes.plot(*plain, "o", color=_PLANS, markersize=8, fillstyle="none", label="plain step", zorder=6)

    def _rivals(self) -> None:
        families: defaultdict[str, list[Reference]] = defaultdict(list)
        for reference in self.references:
            families[reference.family].append(reference)
        for family, members in families.items():
            marker, color = _MARKERS[family]
            xs, ys = ([self.x(member.peak_bytes) for member in members], [self.y(member.time_ns) for member in members])
            label = "segments of equal time" if family == EVERY else members[0].name
            self.axes.plot(xs, ys, marker, color=color, markersize=6, label=label, zorder=3)

    def _measured(self) -> None:
        """Only what was timed often enough to have a spread."""
        timed = [(found, *found.time_spread) for found in self.sweep.measured if found.time_ratio and found.time_spread]
        if not timed:
            return
        plain = self.y(self.plain.time_ns)
        xs = [self.x(found.peak_bytes) for found, _, _ in timed]
        ratios = [found.time_ratio or 0.0 for found, _, _ in timed]
        below = [(ratio - low) * plain for ratio, (_, low, _) in zip(ratios, timed, strict=True)]
        above = [(high - ratio) * plain for ratio, (_, _, high) in zip(ratios, timed, strict=True)]
        ys, label = [ratio * plain for ratio in ratios], "measured: median and spread of pairs"
        how = {"color": _MEASURED, "markersize": 5, "elinewidth": 1.0, "capsize": 3, "zorder": 7}
        self.axes.errorbar(xs, ys, yerr=[below, above], fmt="+", label=label, **how)

    def _limits(self) -> None:
        axes = self.axes
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        left = min(left, self.x(self.sweep.floor_bytes))
        axes.set_xlim(left - _LEFT * (right - left), right)
        axes.set_ylim(low - _BELOW * (high - low), high + _ABOVE * (high - low))

    def _infeasible(self) -> None:
        """Left of the floor nothing fits; from there to the lowest peak of a plan it is not known."""
        sweep, axes = self.sweep, self.axes
        floor, lowest = self.x(sweep.floor_bytes), self.x(min(point.peak_bytes for point in sweep.points))
        axes.axvspan(axes.get_xlim()[0], floor, color=_INFEASIBLE, linewidth=0, zorder=0)
        axes.axvspan(floor, lowest, color=_UNKNOWN, linewidth=0, zorder=0)
        axes.axvline(floor, color=picture.GREY, linewidth=1.2)
        text = f"no schedule fits below {format_bytes(sweep.floor_bytes)}"
        if sweep.floor_op:
            text += f",\nheld by {picture.shortened(sweep.floor_op, 60)}"
        place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "center", "bbox": None}
        picture.note(axes, text, (floor, 0.5), (-3, 0), color="#4a4a4a", **place)

    def _knee(self) -> None:
        knee = self.sweep.knee_point
        spot = (self.x(knee.peak_bytes), self.y(knee.time_ns))
        self.axes.plot(*spot, "*", color=_KNEE, markersize=13, zorder=8)
        (left, right), text = self.axes.get_xlim(), f"suggested: {suggestion(self.sweep)}"
        share = (spot[0] - left) / (right - left)
        side = "left" if share < 0.4 else "right" if share > 0.7 else "center"
        arrow: dict[str, Any] = {
            "arrowstyle": "-",
            "color": _KNEE,
            "linewidth": 0.8,
            "shrinkB": 6,
            "relpos": (_RELATIVE[side], 1.0),
        }
        place: dict[str, Any] = {"xytext": (spot[0], 0.04), "textcoords": ("data", "axes fraction"), "ha": side, "va": "bottom"}
        picture.note(self.axes, text, spot, color=_KNEE, arrowprops=arrow, fontsize=8.5, **place)


def _at_their_peaks(sweep: SweptGraph, rivals: Sequence[Reference], axes: Any) -> None:
    """A row a rival: the extra time of its schedule, and of the fastest plan that peaks no higher."""
    plain = sweep.plain
    labels = []
    for row, rival in enumerate(rivals):
        theirs = (rival.time_ns / max(1, plain.time_ns) - 1) * 100
        best = sweep.within(rival.peak_bytes)
        marker, color = _MARKERS[rival.family]
        if best is not None:
            ours = best.overhead * 100
            axes.plot([ours, theirs], [row, row], color="#c8c8c8", linewidth=2.2, zorder=1)
            axes.plot(ours, row, "o", color=_PLANS, markersize=6, zorder=3)
        axes.plot(theirs, row, marker, color=color, markersize=6, zorder=2)
        said = f"{theirs:+.1f}% against {'no plan so low' if best is None else f'{best.overhead:+.1%}'}"
        picture.note(axes, said, (1.0, row), (6, 0), xycoords=("axes fraction", "data"), va="center", bbox=None)
        share = rival.peak_bytes / max(1, plain.peak_bytes)
        labels.append(f"{picture.shortened(rival.name, 40)}\n{format_bytes(rival.peak_bytes)} ({share:.0%})")
    axes.set_yticks(range(len(labels)), [label.replace("\n", ", ") for label in labels], fontsize=7.5)
    axes.axvline(0, color=picture.GREY, linewidth=0.8)
    axes.set_ylim(len(rivals) - 0.4, -0.6)
    axes.set_title("at the peak of each rival: its extra time against that of a plan (●)", loc="left", fontsize=9)
    axes.set_xlabel("over the plain step [%]")
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
