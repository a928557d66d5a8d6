"""Files of schema 1, as an earlier release wrote them: shown, explained and solved again; not applied."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner import Plan, apply
from planner.cli import main
from planner.errors import PlanFileError
from planner.graph.provenance import Provenance
from planner.graph.schedule import keep_all
from planner.graph.source import Source
from planner.results import plan_file
from planner.results.sweep import Sweep
from tests.support import graphs, models
from tests.support.paths import FILES

PLAN, SWEEP = FILES / "plan-schema-1.json", FILES / "sweep-schema-1.json"


def altered(section: str, **fields: Any) -> str:
    document = json.loads(PLAN.read_text())
    return json.dumps(document | {section: document[section] | fields} if section else document | fields)


def test_a_plan_is_what_it_was() -> None:
    plan = Plan.load(PLAN)
    sources = (replace(op, source=Source(f"body.{n}", "model.py", n)) for n, op in enumerate(graphs.dropout().ops))
    assert plan.graph == replace(graphs.dropout(), ops=tuple(sources))
    assert (plan.budget_bytes, plan.margin_bytes, plan.measured_bytes, plan.check) == (60, 2, 55, "run")
    solution = plan.solution
    assert (solution.status, solution.bound_ns, solution.solver) == ("feasible", 36, "closure/HiGHS")
    assert (solution.schedule, solution.work, solution.limit) == (keep_all(plan.graph), 0.0, "")
    assert plan.provenance == Provenance(
        "measured",
        "cpu",
        is_here=False,
        num_kernels=51,
        num_estimated=2,
        opaque=("body", "head.1"),
        torch="2.13.0",
        date="2026-11-25",
    )


def test_a_sweep_is_what_it_was() -> None:
    swept = Sweep.load(SWEEP)
    assert swept.graph == graphs.skip() and [point.budget_bytes for point in swept.points] == [27, 29, 31]
    assert swept.provenance == Provenance("estimated", "L4-24GB", model="L4-24GB")
    assert swept.knee.is_estimated and all(point.solution.limit == "" for point in swept.points)


@pytest.mark.parametrize("path", [PLAN, SWEEP], ids=["plan", "sweep"])
def test_saved_again_it_is_of_the_schema_of_today(path: Path, tmp_path: Path) -> None:
    kind = Plan if path is PLAN else Sweep
    old = kind.load(path)
    old.save(tmp_path / "new.json")
    document = json.loads((tmp_path / "new.json").read_text())
    assert document["schema"] == 2 and kind.load(tmp_path / "new.json") == old
    assert document["fingerprint"] != json.loads(path.read_text())["fingerprint"]


def test_the_shell_shows_explains_and_solves_it(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["show", str(PLAN)], ["explain", str(PLAN)], ["solve", str(SWEEP), "--budget", "30"], ["show", str(SWEEP)]):
        assert main(asked) == 0, capsys.readouterr().err
        assert capsys.readouterr().out


def test_it_is_not_applied() -> None:
    model, args, kwargs = models.build("mlp")
    with pytest.raises(PlanFileError, match=r"schema 1\): it can be shown, explained and solved again, not applied"):
        apply(Plan.load(PLAN), model, args, kwargs)


def test_fields_that_its_first_writers_left_out_are_not_missed() -> None:
    document = json.loads(PLAN.read_text())
    del document["plan"]["check"], document["plan"]["measured_bytes"]
    plan = plan_file.loads(json.dumps(document), Plan)
    assert (plan.check, plan.measured_bytes) == ("not run", None) and plan == Plan.load(PLAN)
    assert plan_file.loads(altered("plan", made_on={}), Plan).provenance is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (altered("", fingerprint="0" * 32), "was altered: its graph does not match its fingerprint"),
        (altered("graph", forward_outputs=["z"]), "was altered"),
        (altered("graph", ops=[["f0"]]), "holds no valid graph: an op has 1 fields"),
        (altered("graph", ops=3), "is no valid file of schema 1: ops is an int, not a list"),
        (altered("plan", made_on=3), "is no valid file of schema 1: made_on is an int, not an object"),
        (altered("plan", made_on={"costs": []}), "is no valid file of schema 1: made_on"),
        (altered("plan", steps=[0]), "holds no valid plan"),
        (altered("", plan=[]), "is no valid file of schema 1: the section plan is a list"),
    ],
)
def test_a_damaged_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        plan_file.loads(text, Plan)


def test_a_damaged_sweep_is_refused(tmp_path: Path) -> None:
    document = json.loads(SWEEP.read_text())
    for damage, message in (({"points": [3]}, "a point is an int"), ({"made_on": []}, "made_on is a list")):
        (tmp_path / "sweep.json").write_text(json.dumps(document | {"sweep": document["sweep"] | damage}))
        with pytest.raises(PlanFileError, match=f"is no valid file of schema 1: {message}"):
            Sweep.load(tmp_path / "sweep.json")
