"""Where the project and the committed files of the tests lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).with_name("files")
