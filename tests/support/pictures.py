"""Whether a file is a picture with something on it, and what is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def is_png(path: Path) -> bool:
    """A PNG of a sensible size with several colors."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        colors = image.convert("RGB").getcolors(maxcolors=2**24)
        return image.format == "PNG" and min(image.size) > 300 and colors is not None and len(colors) > 10


def is_svg(path: Path) -> bool:
    """An SVG that parses, with paths."""
    root = ElementTree.parse(path).getroot()
    return root.tag.endswith("svg") and any(node.tag.endswith("path") for node in root.iter())


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that lie on each other, by more than a pixel."""
    from itertools import combinations

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    every_axes = figure.findobj(lambda artist: hasattr(artist, "xaxis"))
    not_drawn = {label for axes in every_axes for axis in (axes.xaxis, axes.yaxis) for label in _beyond(axis)}
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in not_drawn]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if a != b and one.padded(-1).overlaps(other.padded(-1))]


def _beyond(axis: Any) -> list[Any]:
    """The labels of ticks beyond the ends of an axis."""
    low, high = sorted(axis.get_view_interval())
    return [label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False) if not low <= at <= high]


@contextmanager
def figures(monkeypatch: Any) -> Iterator[list[Any]]:
    """While entered, the figures that are saved are collected as well."""
    from planner.report import picture

    drawn: list[Any] = []
    save = picture.save
    monkeypatch.setattr(picture, "save", lambda figure, path: (drawn.append(figure), save(figure, path))[1])
    yield drawn
