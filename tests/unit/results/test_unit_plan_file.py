"""Files of plans of units: written, read, and refused where they do not check."""

import json

import pytest

from planner.errors import PlanFileError
from planner.graph.outer import contracted
from planner.graph.planned_units import PlannedKind
from planner.graph.schedule import keep_all
from planner.results import unit_plan_file
from planner.results.unit_plan import UnitPlan
from planner.solver.baselines import recompute_all
from tests.support.unit_graphs import block, whole

NAMES = ["blocks.0", "blocks.1"]


def made():
    own = block()
    kind = PlannedKind("Block", own, (keep_all(own), recompute_all(own)))
    units = {"blocks.0": (0, 1), "blocks.1": (0, 0)}
    return UnitPlan(
        (kind,), units, contracted(whole(2), dict.fromkeys(NAMES, block())), 100, 120, 90, 3, {"odd": "it is called twice"}
    )


def test_what_is_written_is_read():
    plan = made()
    assert unit_plan_file.loads(unit_plan_file.dumps(plan), UnitPlan) == plan
    assert "odd" in str(plan) and "blocks.0" in str(plan)
    assert plan.whole.timeline.time_ns == plan.plain_ns + plan.recompute_ns


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda units: units.pop("kinds"), "the field 'kinds' is missing"),
        (lambda units: units.update(schema=9), "schema 9; this release reads schema 1"),
        (lambda units: units["units"].pop("blocks.0"), "do not go together"),
        (lambda units: units["units"].update({"blocks.0": [0, 7]}), "do not go together"),
        (lambda units: units["units"].update({"blocks.0": [0]}), "has 1 fields, not 2"),
        (lambda units: units["calls"].update({"blocks.0": [0]}), "the ops of blocks.0 are 1, not two for each call"),
        (lambda units: units["calls"].update({"blocks.0": []}), "the ops of blocks.0 are 0, not two for each call"),
        (lambda units: units["calls"].pop("blocks.0"), "do not go together"),
        (lambda units: units["kinds"][0]["graph"].update(backward_outputs=["dx"]), "does not match its fingerprint"),
        (lambda units: units["kinds"][0].update(schedules=[[0], [0]]), "op f1 never runs"),
        (lambda units: units.update(budget_bytes="much"), "budget_bytes"),
    ],
)
def test_what_does_not_check_is_refused(change, said):
    document = json.loads(unit_plan_file.dumps(made()))
    change(document["units"])
    with pytest.raises(PlanFileError, match=said):
        unit_plan_file.loads(json.dumps(document), UnitPlan)


def test_another_plan_is_told_apart():
    document = json.loads(unit_plan_file.dumps(made()))
    del document["units"]
    with pytest.raises(PlanFileError, match="holds no plan of units"):
        unit_plan_file.loads(json.dumps(document), UnitPlan)
