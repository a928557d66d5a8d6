"""The report's file: the page, its style and program, the plotting library and the data, all in one."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from importlib import resources
from pathlib import Path

from planner.errors import PlotMissingError
from planner.report.files import write as write_file
from planner.report.html.data import Content, document
from planner.report.picture import named

MOST_BYTES = 6_000_000
"""No report is larger."""
MOST_STEPS = 2000
"""Steps of a schedule that are drawn, if the file does not grow too large."""
_ASSETS = resources.files("planner.report.html") / "assets"
_PROGRAM = ("text", "answer", "curve", "memory", "modules", "facts", "main")
"""The parts of the program, in the order in which they are joined."""


def check() -> None:
    """Raise PlotMissingError where plotly is missing: before any work."""
    try:
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise PlotMissingError(
            "reports need plotly, which the extra 'report' brings: pip install 'checkpoint-planner[report]'"
        ) from error


def write(content: Content, path: str | Path) -> None:
    """Write the report.

    Raises:
        PlotMissingError: plotly (the extra `report`) is not installed.
        InputError: the file cannot be written.
    """
    write_file(path, page(content))


def page(content: Content) -> str:
    """The file's text, of at most `MOST_BYTES`: series are drawn in fewer steps until that holds."""
    check()
    most = MOST_STEPS
    while len(text := _page(content, most)) > MOST_BYTES and most > 8:
        most //= 2
    return text


def _page(content: Content, most: int) -> str:
    from plotly.offline import get_plotlyjs

    data = json.dumps(document(content, most), separators=(",", ":"))
    shown = content.plans[content.chosen]
    what = " · ".join(["Memory plan", *named(shown.provenance)])
    parts = {
        "TITLE": html.escape(what),
        "STYLE": asset("page.css"),
        "PLOTLY": packed(get_plotlyjs()),
        "DATA": packed(data),
        "PROGRAM": program(),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], asset("page.html"))


def packed(text: str) -> str:
    """A text for the page to unpack: gzip, then base64. The same for the same text; no part of it can end an HTML element."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def unpacked(text: str) -> str:
    """What `packed` packed."""
    return gzip.decompress(base64.b64decode(text)).decode("utf-8")


def program() -> str:
    """What draws the report in the browser."""
    return "\n".join(asset(f"{part}.js") for part in _PROGRAM)


def asset(name: str) -> str:
    """A file that becomes part of the page."""
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")
