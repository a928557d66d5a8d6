"""The report's file: whole, small, safe, and true to `simulate`. (test_report_in_browser.py opens it.)"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import InputError, PlotMissingError
from planner.analysis.sweep import MeasuredPoint
from planner.graph.floor import floor
from planner.graph.provenance import Provenance
from planner.graph.source import Source
from planner.report.html import page
from planner.results import html_report
from planner.results.plan import Plan
from planner.results.sweep import Sweep
from tests.support import graphs
from tests.support.missing import hide
from tests.support.sweeps import plan_of, sweep_of

EVIL = "</script><script>alert('x')</script>&<b>{{DATA}}"


class Elements(HTMLParser):
    """Every element with its attributes, and the texts of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.found[-1] if self.found else ("", {})
        self.texts[attributes.get("id") or tag] = self.texts.get(attributes.get("id") or tag, "") + data


def data_of(text: str) -> dict[str, Any]:
    return json.loads(page.unpacked(Elements(text).texts["packed-data"]))


def live(series: dict[str, Any]) -> list[int]:
    total, held = np.zeros(len(series["start_ns"]), dtype=np.int64), series["held"]
    for first, last, nbytes in zip(held["first"], held["last"], held["bytes"], strict=True):
        total[first : last + 1] += nbytes
    return total.tolist()


@pytest.fixture(scope="module")
def swept() -> Sweep:
    made = sweep_of(graphs.in_modules(), points=4, provenance=Provenance("measured", EVIL, module=EVIL, date="2026-11-28"))
    point = made.points[1]
    return replace(made, measured=(MeasuredPoint(point.budget_bytes, point.peak_bytes + 1, 1.3, True, (1.2, 1.5)),))


@pytest.fixture(scope="module")
def text(swept: Sweep) -> str:
    return page.page(html_report.content(swept.knee, swept))


def test_nothing_is_loaded(text: str) -> None:
    found = Elements(text).found
    linked = [
        (tag, name) for tag, attributes in found for name in attributes if name in ("src", "href", "srcset", "data", "action")
    ]
    assert linked == [] and not {tag for tag, _ in found} & {"link", "iframe", "img", "object", "embed", "base", "form"}
    (policy,) = [attributes["content"] for _, attributes in found if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "connect" not in policy
    assert not re.search(r"https?://|@import|url\(", re.sub(r"[A-Za-z0-9+/=]{1000,}", "", text))


def test_the_library_is_inside_and_the_file_is_small(text: str) -> None:
    from plotly.offline import get_plotlyjs

    assert page.unpacked(Elements(text).texts["packed-plotly"]) == get_plotlyjs()
    assert len(text.encode()) < page.MOST_BYTES


def test_the_same_report_twice_is_the_same_file(swept: Sweep, text: str) -> None:
    assert page.page(html_report.content(swept.knee, swept)) == text


def test_what_users_name_is_text(text: str) -> None:
    elements = Elements(text)
    assert [tag for tag, _ in elements.found].count("script") == 3 and "<script>alert" not in text
    assert EVIL in elements.texts["title"] and EVIL in elements.texts["h1"]
    assert data_of(text)["provenance"]["device"] == EVIL


def test_the_script_makes_text_of_names() -> None:
    program = page.program()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", program)


def test_figures_are_the_simulated_ones(swept: Sweep, text: str) -> None:
    data = data_of(text)
    plans = [swept.plan(point) for point in swept.points]
    for found, peak, time in [
        (data["plain"], swept.plain.peak_bytes, swept.plain.time_ns),
        *((row, plan.peak_bytes, plan.timeline.time_ns) for row, plan in zip(data["plans"], plans, strict=True)),
    ]:
        assert (found["peak_bytes"], found["time_ns"]) == (peak, time)
        assert max(live(found)) == live(found)[found["peak"]] == peak
    for row, plan in zip(data["plans"], plans, strict=True):
        assert live(row) == list(plan.timeline.live_bytes)
        assert (row["overhead"], row["gap"], row["budget_bytes"]) == (plan.overhead, plan.gap, plan.budget_bytes)
        explained, columns = plan.explain(prices=False).rows, row["by_module"]
        for name in ("kept_bytes", "freed_bytes", "recomputed_bytes", "recomputed_ns", "worth_ns"):
            assert sum(columns[name]) == sum(getattr(each, name) for each in explained)
    assert data["chosen"] == [plan.budget_bytes for plan in plans].index(swept.knee.budget_bytes)
    assert sum(size for _, size in data["floor"]["parts"]) == data["floor"]["bytes"] == floor(swept.graph)[0]


def test_measured_stands_beside_predicted(swept: Sweep, text: str) -> None:
    (row,) = data_of(text)["measured"]
    point = swept.points[1]
    assert (row["predicted_bytes"], row["peak_bytes"]) == (point.peak_bytes, point.peak_bytes + 1)
    assert (row["time_ratio"], row["time_spread"], row["predicted_ratio"]) == (1.3, [1.2, 1.5], 1 + point.overhead)


def test_hover_names_tensors_modules_shapes_and_lines() -> None:
    plan = plan_of(graphs.in_modules())
    graph = plan.graph
    values = tuple(replace(value, form="float32[2, 4]") if value.name == "a_0" else value for value in graph.values)
    first = replace(graph.ops[0], kernel="aten.mm.default", arguments="%0:float32[2, 2], %9, 3")
    named = replace(graph, values=values, ops=(first, *graph.ops[1:]))
    data = data_of(page.page(html_report.content(replace(plan, graph=named))))
    name, form, op = next(row for row in data["tensors"] if row[0] == "a_0")
    assert (name, form) == ("a_0", "float32[2, 4]")
    op_name, call, module, place = data["ops"][op]
    assert (op_name, call) == ("fa0", "aten.mm.default(x:float32[2, 2], %9, 3)")
    assert (data["modules"][module], place) == ("h.0.up", "model.py:1")


def test_a_plan_alone(tmp_path: Path) -> None:
    plan = replace(plan_of(graphs.in_modules()), measured_bytes=9)
    plan.html(tmp_path / "plan.html")
    data = data_of((tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert len(data["plans"]) == 1 and data["references"] and data["measured"][0]["peak_bytes"] == 9


def test_a_plan_among_those_of_a_sweep(swept: Sweep, tmp_path: Path) -> None:
    between = (swept.points[0].budget_bytes + swept.points[1].budget_bytes) // 2
    plan = replace(swept.knee, budget_bytes=between, solution=swept.points[0].solution)
    for write in (lambda path: plan.html(path, swept), lambda path: swept.html(path, plan)):
        write(tmp_path / "both.html")
        data = data_of((tmp_path / "both.html").read_text(encoding="utf-8"))
        budgets = [row["budget_bytes"] for row in data["plans"]]
        assert budgets == sorted({*budgets, between}) and budgets[data["chosen"]] == between
    with pytest.raises(InputError, match="another graph"):
        plan_of(graphs.blocks(5)).html(tmp_path / "other.html", swept)
    with pytest.raises(InputError, match="cannot write"):
        swept.html(tmp_path / "none" / "report.html")
    with pytest.raises(InputError, match="path"):
        swept.html("")


def test_a_sweep_of_very_many_plans_is_thinned(swept: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "_MOST_PLANS", 2)
    shown = [plan.budget_bytes for plan in html_report.content(swept.plan(swept.points[-1]), swept).plans]
    assert shown == [point.budget_bytes for k, point in enumerate(swept.points) if k in (0, 1, 3)], (
        "the ends, and what was measured"
    )


def test_a_large_report_is_thinned_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphs.blocks(300)
    sources = [Source(f"h.{i}.m", "model.py", i) for i in range(len(graph.ops))]
    graph = replace(graph, ops=tuple(replace(op, source=source) for op, source in zip(graph.ops, sources, strict=True)))
    plan: Plan = plan_of(graph, 0.9)
    content = html_report.content(plan)
    whole = page.page(content)
    monkeypatch.setattr(page, "MOST_BYTES", len(whole) - 5_000)
    thinned = page.page(content)
    assert len(thinned) <= page.MOST_BYTES
    before, after = (data_of(text)["plans"][0] for text in (whole, thinned))
    assert len(after["start_ns"]) < len(before["start_ns"]) == len(plan.solution.schedule.steps)
    assert max(live(after)) == after["peak_bytes"] == plan.peak_bytes


def test_a_missing_plotly_names_the_extra(swept: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "plotly")
    with pytest.raises(PlotMissingError, match=r"checkpoint-planner\[report\]"):
        swept.html(tmp_path / "report.html")
