"""HTML reports in headless Chromium: they open without an error or a request, and hover, slider and marks work.

What they need: see tests/support/browser.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.graph.provenance import Provenance
from planner.graph.source import Source
from planner.results.sweep import Sweep
from planner.units import format_bytes
from tests.support import graphs
from tests.support.browser import chromium, open_report, wait
from tests.support.sweeps import sweep_of

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def swept() -> Sweep:
    """Plans of a model whose device, tensors and modules are named like HTML."""
    graph = graphs.in_modules()
    first = replace(graph.ops[0], name=EVIL, source=Source(f"h.0.{EVIL.replace('.', '')}", "model.py", 1))
    graph = replace(graph, ops=(first, *graph.ops[1:]))
    return sweep_of(graph, points=5, provenance=Provenance("measured", EVIL, module=EVIL, date="2026-11-28"))


@pytest.fixture
def opened(driver: Any, swept: Sweep, tmp_path: Path) -> Any:
    swept.html(tmp_path / "report.html")
    for log in ("browser", "performance"):
        driver.get_log(log)
    open_report(driver, tmp_path / "report.html")
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def text_of(driver: Any, name: str) -> str:
    return driver.execute_script("return document.getElementById(arguments[0]).textContent", name)


def show(driver: Any, k: int) -> None:
    """Moves the slider."""
    script = "const s = document.getElementById('plan'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    driver.execute_script(script, str(k))
    wait(driver, "document.body.dataset.plan === arguments[0]", str(k))


def hover(driver: Any, plot: str, share: float) -> None:
    """Moves the pointer over a plot, to this share of its width."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    area = driver.find_element(By.CSS_SELECTOR, f"#{plot} .nsewdrag")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    x = int((share - 0.5) * area.size["width"])
    ActionChains(driver).move_to_element_with_offset(area, x, 0).move_by_offset(1, 1).perform()


def test_it_opens_without_requests(opened: Any) -> None:
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []
    for plot in ("curve", "memory", "floor"):
        assert opened.execute_script("return document.querySelectorAll(`#${arguments[0]} .plot-container`).length", plot) == 1


def test_names_are_text(opened: Any) -> None:
    assert EVIL in opened.title and opened.execute_script("return document.querySelector('img, main script') === null")
    assert EVIL in text_of(opened, "provenance")


def test_the_slider_shows_each_plan(opened: Any, swept: Sweep) -> None:
    for k, point in enumerate(swept.points):
        show(opened, k)
        assert format_bytes(point.peak_bytes) in text_of(opened, "answer")
        assert (
            opened.execute_script("return document.getElementById('call').value")
            == f"plan(model, {point.budget_bytes}, args, kwargs)"
        )
        drawn = "document.getElementById('memory').data.find((trace) => trace.name === 'planned, all').y"
        # in bytes: the graph is so small
        assert max(opened.execute_script(f"return {drawn}")) == point.peak_bytes
        assert f"at the peak: {format_bytes(point.peak_bytes)} live" in text_of(opened, "moment")


def test_a_click_on_a_plan_shows_it(opened: Any) -> None:
    opened.execute_script(
        "document.getElementById('curve').emit('plotly_click', {points: [{data: {name: 'plans'}, customdata: 1}]})"
    )
    wait(opened, "document.body.dataset.plan === '1'")
    assert opened.execute_script("return document.getElementById('plan').value") == "1"


def test_hover_lists_what_is_live(opened: Any) -> None:
    show(opened, 0)
    assert "at the peak" in text_of(opened, "moment")
    hover(opened, "memory", 0.3)
    wait(opened, "document.getElementById('moment').textContent.includes('under the pointer')")
    first = text_of(opened, "moment")
    assert "forward" in first and "h." in first and "model.py:" in first
    assert opened.execute_script("return document.querySelectorAll('#memory .hoverlayer .hovertext').length") >= 1
    hover(opened, "memory", 0.9)
    wait(opened, "document.getElementById('moment').textContent !== arguments[0]", first)


def test_a_click_on_a_module_marks_what_it_holds(opened: Any, swept: Sweep) -> None:
    show(opened, len(swept.points) - 1)
    row = "[...document.querySelectorAll('#modules tr')].find((row) => row.dataset.path === 'h.*.down')"
    opened.execute_script(f"{row}.click()")
    wait(opened, f"{row}.classList.contains('marked')")
    marked = "document.getElementById('memory').data.find((trace) => trace.name.startsWith('marked'))"
    wait(opened, f"{marked} !== undefined")
    # the plan of the largest budget keeps the 4 bytes of each of the four modules
    assert max(opened.execute_script(f"return {marked}.y")) == 16
    opened.execute_script("document.getElementById('unmark').click()")
    wait(opened, f"{marked} === undefined")


def test_layers_can_be_listed_one_by_one(opened: Any) -> None:
    paths = "[...document.querySelectorAll('#modules tbody tr')].map((row) => row.dataset.path)"
    assert "h.*.down" in opened.execute_script(f"return {paths}")
    opened.execute_script("document.getElementById('together').click()")
    wait(opened, f"{paths}.includes('h.1.down')")
    opened.execute_script("document.getElementById('together').click()")
