"""The one home of matplotlib: figures without a screen, written as PNG or SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from planner.errors import InputError, PlotMissingError
from planner.report.files import write

SUFFIXES = (".png", ".svg")
GREY = "#6f6f6f"
DPI = 200
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.labelsize": 9.0,
    "axes.titlesize": 10.0,
    "legend.fontsize": 8.0,
    "svg.hashsalt": "planner",
}


def check(path: str | Path) -> None:
    """Raise InputError for a suffix that is not written, PlotMissingError where matplotlib is missing: before any work."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot draw {path}: give a file name that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotMissingError(
            "pictures need matplotlib, which the extra 'plot' brings: pip install 'checkpoint-planner[plot]'"
        ) from error


def style() -> Any:
    """A context in which figures are drawn and saved: plain fonts, the same file for the same figure."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str | Path) -> None:
    """Write a figure: an SVG without a date, or a PNG of 256 colors, which takes a third of the bytes of one of all colors.

    Raises:
        InputError: the file cannot be written.
    """
    vector = Path(path).suffix.lower() == ".svg"
    drawing, content = io.BytesIO(), io.BytesIO()
    drawn.savefig(drawing, format="svg" if vector else "png", dpi=DPI, metadata={"Date": None} if vector else None)
    if vector:
        content = drawing
    else:
        from PIL import Image  # matplotlib depends on it

        few = Image.open(drawing).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # which loses no color of a marker
        few.save(content, format="PNG", optimize=True)
    write(path, content.getvalue())


def bytes_unit(nbytes: int) -> tuple[str, float]:
    """The unit that suits an axis up to this many bytes, and its size."""
    for unit, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if nbytes >= 4 * size:
            return unit, size
    return "B", 1.0


def time_unit(ns: int) -> tuple[str, float]:
    """The unit that suits an axis up to this many nanoseconds, and its size."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= 2 * size:
            return unit, size
    return "ns", 1.0
