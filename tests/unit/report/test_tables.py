"""Layout of tables: as wide as the terminal, 80 columns where there is none, and nothing lost."""

import sys
from dataclasses import replace

import pytest

from planner.graph.graph import Graph
from planner.graph.source import Source
from planner.report.tables import WIDTH, facts, number, render, table, words
from planner.results.plan import Plan
from planner.solver.solve import Solver
from tests.support import graphs
from tests.support.text import unwrapped

LONG = "a sentence that is longer than a line of eighty characters, and goes on below itself where its name ends"


def test_a_long_sentence_goes_on_below_itself():
    first, second = render(facts([("name", LONG), ("no sentence", "")])).splitlines()
    assert first.startswith("name a sentence") and second[:5].isspace() and not second[5].isspace()
    assert unwrapped(f"{first} {second}") == f"name {LONG}"


def test_figures_are_never_broken_and_names_are():
    name = "a.very.long.path." * 10
    lines = render(table([words("module"), number("kept"), number("time")], [(name, "1.00 MiB", "3 us")])).splitlines()
    assert max(map(len, lines)) <= WIDTH and lines[2].endswith("1.00 MiB  3 us")
    assert lines[2].split()[0] + "".join(lines[3:]).replace(" ", "") == name


def with_long_names() -> Graph:
    graph = graphs.blocks(8)
    sources = [Source(f"transformer.encoder.layers.{i}.feed_forward.projection", "model.py", i) for i in range(len(graph.ops))]
    return replace(graph, ops=tuple(replace(op, source=source) for op, source in zip(graph.ops, sources, strict=True)))


@pytest.mark.parametrize("report", ["plan", "explain"])
def test_reports_of_long_names_are_no_wider(report):
    graph = with_long_names()
    budget = Solver(graph).lowest_peak()
    made = Plan(graph, budget, 0, Solver(graph).solve(budget))
    text = str(made if report == "plan" else made.explain(prices=False))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "projection" in "".join(text.split())


def test_names_are_text_and_not_markup():
    assert render(facts([("[bold]", ":smile: layers[0] [/]")])) == "[bold] :smile: layers[0] [/]"


@pytest.mark.parametrize(("columns", "num_lines"), [(60, 3), (200, 1)])
def test_a_terminal_gives_the_width(monkeypatch, columns, num_lines):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = render(facts([("name", LONG)])).splitlines()
    assert len(lines) == num_lines and max(map(len, lines)) <= columns


def test_the_environment_does_not_widen_a_file(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, render(facts([("name", LONG)])).splitlines())) <= WIDTH
