"""The one home of matplotlib: figures without a screen, written as PNG or SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import InputError, PlotMissingError
from planner.graph.provenance import Provenance
from planner.report.files import write

SUFFIXES = (".png", ".svg")
GREY = "#6f6f6f"
DPI = 200
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
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


def title(drawn: Any, what: str, provenance: Provenance | None) -> None:
    """The figure's title: what is drawn, and of which model, for which device and when."""
    text = " · ".join([what, *named(provenance)])
    drawn.suptitle(text, x=0.01, ha="left", fontsize=10.5, fontweight="bold", parse_math=False)


def named(provenance: Provenance | None) -> list[str]:
    """The model, the device, how costs were found, and the date: what is known of them."""
    if provenance is None:
        return []
    device = f"{provenance.device}{'' if provenance.is_here else ' (not here)'}"
    return [part for part in (provenance.module, device, f"costs {provenance.costs}", provenance.date) if part]


def note(axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float] = (0, 0), **how: Any) -> None:
    """A label beside a point or a line, readable on whatever lies below it."""
    box = {"boxstyle": "square,pad=0.15", "facecolor": "#ffffff", "alpha": 0.8, "linewidth": 0}
    given = {"fontsize": 7.5, "bbox": box, "zorder": 10, "parse_math": False, "xytext": offset, "textcoords": "offset points"}
    axes.annotate(text, at, **given | how)


def shortened(text: str, width: int) -> str:
    """A text of at most so many characters: its end says more than its start ("...layers.*.self_attn.q_proj")."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def save(drawn: Any, path: str | Path) -> None:
    """Write a figure: an SVG without a date, or a PNG of few colors.

    Raises:
        InputError: the file cannot be written.
    """
    vector = Path(path).suffix.lower() == ".svg"
    drawing = io.BytesIO()
    drawn.savefig(drawing, format="svg" if vector else "png", dpi=DPI, metadata={"Date": None} if vector else None)
    write(path, drawing.getvalue() if vector else of_few_colors(drawing.getvalue()))


def of_few_colors(png: bytes) -> bytes:
    """A PNG with the 256 commonest of its colors, and each of the others as the one nearest to it: a third of the bytes."""
    from PIL import Image  # matplotlib depends on it

    every = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int32)
    codes = every[..., 0] << 16 | every[..., 1] << 8 | every[..., 2]
    found, count = np.unique(codes, return_counts=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    palette = colors[np.argsort(-count, kind="stable")[:256]]
    nearest = np.zeros(1 << 24, dtype=np.uint8)
    nearest[found] = [((palette - color) ** 2).sum(axis=1).argmin() for color in colors]
    few, written = Image.fromarray(nearest[codes], mode="P"), io.BytesIO()
    few.putpalette(palette.astype(np.uint8).tobytes())
    few.save(written, format="PNG", optimize=True)
    return written.getvalue()


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
