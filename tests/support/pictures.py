"""Whether a file is a picture with something on it."""

from pathlib import Path
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
