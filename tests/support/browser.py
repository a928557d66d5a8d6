"""Reports in headless Chromium.

Needs the extra `browser` (selenium), and Debian's packages `chromium` and `chromium-driver`, or what the environment variables
BROWSER and BROWSER_DRIVER name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1300, 1000
"""Of the window, in pixels."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a log of its console and one of its requests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _found("BROWSER", "chromium", "chromium-browser", "google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(_found("BROWSER_DRIVER", "chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_report(driver: Any, path: Path) -> None:
    """Opens a report, and waits until it is drawn."""
    driver.get(path.absolute().as_uri())
    wait(driver, "document.body.dataset.ready")


def wait(driver: Any, condition: str, *arguments: Any) -> None:
    """Waits until an expression of JavaScript is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda page: page.execute_script(f"return {condition}", *arguments))


def screenshot(driver: Any) -> bytes:
    """The whole page that is open, as PNG."""
    height = driver.execute_script("return document.documentElement.scrollHeight")
    driver.set_window_size(WIDTH, height + 160)  # the window has a bar of its own
    wait(driver, "window.innerHeight >= document.documentElement.scrollHeight")
    driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 500))")
    content: bytes = driver.get_screenshot_as_png()
    driver.set_window_size(WIDTH, HEIGHT)
    return content


def _found(variable: str, *names: str) -> str:
    path = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    assert path, f"no {names[0]}: install it, or name it in {variable}"
    return path
