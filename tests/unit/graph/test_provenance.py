"""How costs were found and how a solver ended: fields, formatted where they are printed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.solution import Solution
from planner.limits import Limits
from planner.results.figures import plan_figures
from planner.results.plan import Plan
from planner.results.sweep_file import summary
from tests.support import graphs
from tests.support.sweeps import sweep_of
from tests.support.text import unwrapped

MEASURED = Provenance("measured", "cpu, 4 threads", num_kernels=51, torch="2.13.0", date="2026-11-28")
ABSENT = Provenance("estimated", "H100-80GB", is_here=False, model="H100-80GB")
STOPPED = "limit of wall-clock time: another run may give another plan"


def a_plan(limit: str = "", provenance: Provenance | None = None) -> Plan:
    graph = graphs.skip()
    return Plan(graph, 40, 2, Solution("feasible", keep_all(graph), 5, 0.25, "closure", 1.5, limit), provenance)


@pytest.mark.parametrize(
    ("provenance", "text"),
    [
        (MEASURED, "cpu, 4 threads; costs measured; torch 2.13.0; 2026-11-28"),
        (
            replace(MEASURED, num_estimated=2, opaque=("body", "head.1"), torch="", date=""),
            "cpu, 4 threads; costs measured, 2 of 51 kernels estimated; as they are: body, head.1",
        ),
        (ABSENT, "H100-80GB (not here); costs estimated for H100-80GB"),
        (
            replace(MEASURED, repeats=(("Block", 12), ("Layer", 2)), torch="", date=""),
            "cpu, 4 threads; costs measured; 12 Block captured once; 2 Layer captured once",
        ),
    ],
)
def test_it_prints_as_a_line(provenance: Provenance, text: str) -> None:
    assert str(provenance) == text
    assert f" costs {text} " in unwrapped(a_plan(provenance=provenance))


def test_a_plan_is_estimated_where_no_kernel_was_run() -> None:
    assert a_plan(provenance=ABSENT).is_estimated
    assert not a_plan(provenance=replace(MEASURED, num_estimated=50)).is_estimated
    assert not a_plan().is_estimated and "\ncosts " not in str(a_plan())


def test_a_plan_that_time_stopped_says_so_in_a_line() -> None:
    assert f" stopped by the {STOPPED} " in unwrapped(a_plan("time"))
    assert "stopped" not in str(a_plan())


def test_figures_are_fields() -> None:
    figures = plan_figures(a_plan("time", MEASURED))
    assert (figures["work"], figures["limit"], figures["provenance"]) == (1.5, "time", asdict(MEASURED))
    assert json.loads(json.dumps(figures))["provenance"]["opaque"] == []
    assert plan_figures(a_plan())["provenance"] is None


def test_a_sweep_says_how_many_plans_time_stopped() -> None:
    swept = sweep_of(graphs.skip(), points=3, limits=Limits(0.5), provenance=MEASURED)
    first, *others = (
        replace(point, solution=replace(point.solution, limit=limit, work=0.5))
        for point, limit in zip(swept.points, ("time", "", ""), strict=True)
    )
    some = replace(swept, points=(first, *others))
    assert f" stopped 1 of 3 plans by the {STOPPED} " in unwrapped(some) and str(MEASURED) in unwrapped(some)
    assert "stopped" not in str(replace(some, points=tuple(others)))
    assert [(point["limit"], point["work"]) for point in summary(some)["points"]] == [("time", 0.5), ("", 0.5), ("", 0.5)]
    assert some.plan(first).provenance == MEASURED
