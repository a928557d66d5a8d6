from __future__ import annotations

import difflib
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import GraphError, InputError, PlanFileError
from planner.graph.graph import Graph, Kind, Value
from planner.graph.provenance import Provenance
from planner.graph.schedule import Schedule, keep_all
from planner.graph.simulate import simulate
from planner.graph.solution import LIMITS, Solution
from planner.results import plan_file
from planner.results.plan import Plan
from tests.support import graphs
from tests.support.strategies import random_schedule, training_graphs


def a_plan() -> Plan:
    graph = graphs.dropout()
    plain = keep_all(graph)
    solution = Solution("optimal", plain, simulate(graph, plain).time_ns, 0.25, "keep all", 0.125, "time")
    return Plan(graph, 1000, 10, solution, Provenance("measured", "cpu", torch="2.13.0"))


PROVENANCES = (
    Provenance(
        "measured",
        "cpu, 4 threads",
        num_kernels=51,
        num_estimated=2,
        repeats=(("Block", 12),),
        torch="2.13.0",
        date="2026-11-25",
    ),
    Provenance("estimated", "H100-80GB", is_here=False, model="H100-80GB", opaque=("body", "head.1"), module="GPT"),
)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_round_trip_is_the_identity(data: st.DataObject) -> None:
    graph = data.draw(training_graphs())
    schedule = random_schedule(data.draw, graph)
    peak = simulate(graph, schedule).peak_bytes
    work, limit = data.draw(st.floats(0, 1e9)), data.draw(st.sampled_from(LIMITS))
    provenance = data.draw(st.none() | st.sampled_from(PROVENANCES))
    plan = Plan(graph, peak, 0, Solution("feasible", schedule, 3, 0.5, "closure/HiGHS", work, limit), provenance)
    text = plan_file.dumps(graph, plan)
    assert plan_file.loads(text, Plan) == plan
    assert plan_file.dumps(plan.graph, plan_file.loads(text, Plan)) == text


def test_what_values_are_travels_and_may_be_missing() -> None:
    plan = a_plan()
    first, second, *others = plan.graph.values
    known = (replace(first, form="float32[2, 4]"), replace(second, form="int64[]", hidden_bytes=second.nbytes), *others)
    text = plan_file.dumps(replace(plan.graph, values=known), plan)
    assert plan_file.loads(text, Plan).graph.values == known
    document = json.loads(text)
    document["graph"]["values"] = [row[:4] for row in document["graph"]["values"]]
    del document["plan"]["provenance"]["module"]
    older = plan_file.loads(json.dumps(document), Plan)
    assert {value.form for value in older.graph.values} == {""} and older.provenance == plan.provenance
    document["graph"]["values"][0] += [7]
    with pytest.raises(PlanFileError, match=r"the form of .* is an int, not a string"):
        plan_file.loads(json.dumps(document), Plan)


def test_save_and_load(tmp_path: Path) -> None:
    plan = a_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan_file.load_graph(tmp_path / "plan.json") == plan.graph


def test_a_file_may_hold_a_graph_alone(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(plan_file.dumps(graphs.skip()))
    assert plan_file.load_graph(tmp_path / "graph.json") == graphs.skip()
    with pytest.raises(PlanFileError, match="holds no valid plan"):
        plan_file.load(tmp_path / "graph.json", Plan)


def test_a_graph_file_may_be_packed(tmp_path: Path) -> None:
    packed = gzip.compress(plan_file.dumps(graphs.skip()).encode())
    (tmp_path / "graph.json.gz").write_bytes(packed)
    assert plan_file.load_graph(tmp_path / "graph.json.gz") == graphs.skip()
    for broken in (b"{}", packed[:-20], packed[:40] + bytes(20) + packed[60:]):
        (tmp_path / "broken.json.gz").write_bytes(broken)
        with pytest.raises(PlanFileError, match=r"broken\.json\.gz"):
            plan_file.load_graph(tmp_path / "broken.json.gz")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        a_plan().save(tmp_path / "nowhere" / "plan.json")


def lines_that_differ(one: str, other: str) -> list[str]:
    return [line for line in difflib.ndiff(one.splitlines(), other.splitlines()) if line[0] in "+-"]


def test_a_change_shows_as_the_lines_that_it_is_about() -> None:
    plan = a_plan()
    text = plan_file.dumps(plan.graph, plan)
    first, second, *others = plan.graph.ops
    slower = replace(plan.graph, ops=(first, replace(second, cost_ns=second.cost_ns + 5), *others))
    differing = lines_that_differ(text, plan_file.dumps(slower, plan))
    assert len(differing) == 2 and all(f'["{second.name}"' in line for line in differing)

    graph = graphs.blocks(8)
    plain = keep_all(graph).steps
    turn = graph.num_forward_ops
    again = Schedule((*plain[:turn], plain[1], *plain[turn:]))
    texts = [
        plan_file.dumps(graph, replace(plan, solution=replace(plan.solution, schedule=s))) for s in (keep_all(graph), again)
    ]
    assert len(lines_that_differ(*texts)) <= 4
    assert "   1,\n" in texts[1]


def test_keys_are_sorted_and_every_op_and_value_has_a_line() -> None:
    plan = a_plan()
    text = plan_file.dumps(plan.graph, plan)
    document = json.loads(text)
    for keys in (list(document), list(document["graph"]), list(document["plan"]), list(document["plan"]["provenance"])):
        assert keys == sorted(keys)
    lines = text.splitlines()
    assert sum(line.startswith("   [") for line in lines) == len(plan.graph.ops) + len(plan.graph.values)


def altered(**plan_fields: object) -> str:
    document = json.loads(plan_file.dumps(graphs.dropout(), a_plan()))
    document["plan"].update(plan_fields)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "names no schema version"),
        ("{}", "names no schema version"),
        ('{"schema": 99}', "has schema 99, of a newer release; this one reads schema 2. Update checkpoint-planner"),
        ('{"schema": 0}', "has schema 0; this release reads schema 2. Make the plan again"),
        ('{"schema": "new"}', "has schema new"),
        ('{"schema": 2}', "holds no valid graph"),
        ('{"schema": 1}', "is no valid file of schema 1: the section graph is None"),
        (altered(budget_bytes=5), "above its own budget of 5"),
        (altered(steps=[0, 1]), "never runs"),
        (altered(steps=[0, 1, 2, 3, 0, 4, 5, 6]), "cannot be recomputed exactly"),
        (altered(provenance=3), "holds no valid plan: provenance is an int, not an object"),
        (altered(provenance={"costs": "guessed"}), "num_kernels"),
        (altered(limit="nodes"), "limit is 'nodes', not one of '', 'time'"),
        (altered(work=-1), "work is -1, not a number that is not negative"),
        (altered(status="best"), "status is 'best', not one of 'optimal', 'feasible'"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        plan_file.loads(text, Plan)


def test_an_altered_graph_is_refused() -> None:
    text = plan_file.dumps(graphs.dropout(), a_plan()).replace('["y", 8, "activation"]', '["y", 7, "activation"]')
    with pytest.raises(PlanFileError, match="was altered"):
        plan_file.loads(text, Plan)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"nowhere\.json"):
        plan_file.load(tmp_path / "nowhere.json", Plan)


def wrong(graph: Graph, **changes: object) -> Graph:
    return replace(graph, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (*graphs.chain().values, Value("a", 1, Kind.ACTIVATION))}, "value names occur twice: a"),
        ({"values": (*graphs.chain().values, Value("a2", 1, Kind.ACTIVATION))}, "no op writes value a2"),
        ({"values": (*graphs.chain().values, Value("w2", 1, Kind.PARAM))}, "w2 of kind param must be among the inputs"),
        (
            {"values": (*graphs.chain().values[:2], Value("a", -1, Kind.ACTIVATION), *graphs.chain().values[3:])},
            "-1 bytes|reads",
        ),
        ({"ops": graphs.chain().ops[:1] * 2 + graphs.chain().ops[2:]}, "op names occur twice: f0"),
        ({"ops": (graphs.op("f9", "c", "a"), *graphs.chain().ops[1:])}, "op f9 reads c, which is not written before it"),
        ({"ops": (graphs.op("f9", "x t", "a"), *graphs.chain().ops[1:])}, "forward op f9 reads t, the gradient of an output"),
        ({"ops": (*graphs.chain().ops, graphs.op("b9", "x", "ga"))}, "value ga is written twice"),
        ({"forward_outputs": ("nothing",)}, "nothing is not a value of the graph"),
        ({"forward_outputs": ("dw",)}, "forward output dw is written by backward op b0"),
        ({"num_forward_ops": 9}, "num_forward_ops is 9"),
        (
            {
                "values": (*graphs.chain().values, Value("r", 1, Kind.RESERVED)),
                "inputs": (*graphs.chain().inputs, "r"),
                "forward_outputs": ("loss", "r"),
            },
            "reserved bytes r are read by an op, or are an output",
        ),
    ],
)
def test_a_malformed_graph_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        wrong(graphs.chain(), **changes)
