"""A sweep as a picture: peak memory against step time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
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


def plot(sweep: SweptGraph, references: Iterable[Reference], path: str | Path) -> None:
    """Draw the plans, the certificate's bound, reference schedules, the knee, the floor, and what was measured.

    Raises:
        PlotMissingError, InputError: as `Sweep.plot`.
    """
    picture.check(path)
    with picture.style():
        drawn = picture.figure(8.4, 5.2)
        _Axes(sweep, references, drawn.add_subplot()).draw()
        picture.save(drawn, path)


class _Axes:
    """One pair of axes: bytes to the right, step time up; on the right edge the time over that of the plain step."""

    def __init__(self, sweep: SweptGraph, references: Iterable[Reference], axes: Any) -> None:
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
        self._references()
        self._measured()
        self._floor()
        self._knee()
        axes, plain_y = self.axes, max(self.y(self.plain.time_ns), 1e-9)
        axes.set_title("Peak memory against step time", loc="left")
        axes.set_xlabel(f"peak of the step [{self.memory}]")
        axes.set_ylabel(f"step time [{self.time}]")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        right = axes.secondary_yaxis("right", functions=(lambda y: (y / plain_y - 1) * 100, lambda p: (p / 100 + 1) * plain_y))
        right.set_ylabel("over the plain step [%]")
        axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)

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

    def _references(self) -> None:
        families: defaultdict[str, list[Reference]] = defaultdict(list)
        for reference in self.references:
            families[reference.family].append(reference)
        for family, members in families.items():
            marker, color = _MARKERS[family]
            xs, ys = ([self.x(member.peak_bytes) for member in members], [self.y(member.time_ns) for member in members])
            label = "every k-th: number of segments" if family == EVERY else members[0].name
            self.axes.plot(xs, ys, marker, color=color, markersize=6, label=label, zorder=3)
            for member, x, y in zip(members, xs, ys, strict=True):
                if family == EVERY:
                    where = {"xytext": (5, 3), "textcoords": "offset points"}
                    self.axes.annotate(f"{member.num_segments}", (x, y), fontsize=7, color=color, **where)

    def _measured(self) -> None:
        found = [found for found in self.sweep.measured if found.time_ratio is not None]
        xs = [self.x(point.peak_bytes) for point in found]
        ys = [self.y((point.time_ratio or 0.0) * self.plain.time_ns) for point in found]
        if found:
            label = "measured (time: beside a plain step)"
            self.axes.plot(xs, ys, "+", color=_MEASURED, markersize=10, markeredgewidth=1.4, label=label, zorder=7)

    def _floor(self) -> None:
        sweep, axes = self.sweep, self.axes
        axes.axvline(self.x(sweep.floor_bytes), color=picture.GREY, linestyle=":", linewidth=1.2)
        text = f"floor {format_bytes(sweep.floor_bytes)}"
        if sweep.floor_op:
            text += f", held by\n{sweep.floor_op.replace(' (', chr(10) + '(')}"
        axes.annotate(
            text,
            (self.x(sweep.floor_bytes), 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=picture.GREY,
            va="bottom",
        )

    def _knee(self) -> None:
        knee = self.sweep.knee_point
        spot = (self.x(knee.peak_bytes), self.y(knee.time_ns))
        self.axes.plot(*spot, "*", color=_KNEE, markersize=13, label=f"suggested: {suggestion(self.sweep)}", zorder=8)
