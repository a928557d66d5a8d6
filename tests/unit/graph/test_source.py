"""Where an op comes from is a fact with fields, whatever a file or a module is called; its text is only printed."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from dataclasses import replace

import pytest
import torch

from planner import export_source, plan
from planner.errors import PlanFileError
from planner.graph.modules import TOP, module_of, place_of
from planner.graph.schedule import keep_all
from planner.graph.solution import Solution
from planner.graph.source import NOWHERE, Source, source_from_json, source_to_json
from planner.report import perfetto
from planner.results import plan_file
from planner.results.plan import Plan
from planner.tracer.capture import capture
from tests.support import graphs

SOURCES = {
    "body.0 model.py:12": Source("body.0", "model.py", 12),
    "body.0 my model.py:12": Source("body.0", "my model.py", 12),
    "my model.py:12": Source(file="my model.py", line=12),
    "two words.0 a (b) c.py:1": Source("two words.0", "a (b) c.py", 1),
    "transformer.h.0.mlp (Linear)": Source("transformer.h.0.mlp", note="Linear"),
    "body.core (runs as it is)": Source("body.core", note="runs as it is"),
    "body": Source("body"),
    "": NOWHERE,
}
QUICK = {"costs": "estimate", "progress": False}


@pytest.mark.parametrize(("text", "source"), SOURCES.items())
def test_a_source_is_printed_in_one_form_and_written_in_another_that_reads_back(text, source):
    assert str(source) == text and bool(source) == bool(text)
    assert source_from_json(json.loads(json.dumps(source_to_json(source))), "the source") == source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("body.0 model.py:12", Source("body.0", "model.py", 12)),
        ("model.py:12", Source(file="model.py", line=12)),
        (" model.py:9", Source(file="model.py", line=9)),
        ("body.core (runs as it is)", Source("body.core", note="runs as it is")),
        ("(BatchNorm1d)", Source(note="BatchNorm1d")),
        ("", NOWHERE),
        ("what nobody wrote", Source(note="what nobody wrote")),
        (f"model.py:{'9' * 5000}", Source(note=f"model.py:{'9' * 5000}")),
    ],
)
def test_the_text_of_older_plan_files_is_read(text, source):
    assert source_from_json(text, "the source") == source


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (["body", "model.py", 3], "the source has 3 fields, not 4"),
        (["body", "model.py", "3", ""], "the line of the source is '3', not an integer"),
        ([None, "model.py", 3, ""], "the module of the source is"),
        (7, "the source is .*, not a list"),
    ],
)
def test_a_source_of_another_form_is_named(value, complaint):
    with pytest.raises(ValueError, match=complaint):
        source_from_json(value, "the source")


def a_plan():
    """A plan in which every op has another source."""
    graph = graphs.skip()
    sources = [*SOURCES.values()]
    ops = tuple(replace(op, source=sources[i % len(sources)]) for i, op in enumerate(graph.ops))
    assert len(ops) >= len(sources)
    graph = replace(graph, ops=ops)
    return Plan(graph, 40, 2, Solution("optimal", keep_all(graph), 5, 0.25, "closure"))


def test_plan_files_and_traces_hold_the_fields():
    made = a_plan()
    assert plan_file.loads(plan_file.dumps(made.graph, made), Plan) == made
    events = [
        event for event in json.loads(perfetto.dumps(made))["traceEvents"] if event.get("cat") == "op" and event["pid"] == 1
    ]
    assert [Source(**event["args"]["source"]) for event in events] == [op.source for op in made.graph.ops]


def test_a_plan_file_with_texts_is_read():
    made = a_plan()
    document = json.loads(plan_file.dumps(made.graph, made))
    for row, op in zip(document["graph"]["ops"], made.graph.ops, strict=True):
        row[7] = str(op.source)
    read = plan_file.loads(json.dumps(document), Plan)
    assert [op.source for op in read.graph.ops] == [source_from_json(str(op.source), "") for op in made.graph.ops]
    assert read.graph.ops[0].source == made.graph.ops[0].source == Source("body.0", "model.py", 12)
    document["graph"]["ops"][0][7] = 7
    with pytest.raises(PlanFileError, match=r"the source of op '.*' is .*, not a list"):
        plan_file.loads(json.dumps(document), Plan)


def test_modules_and_places_are_fields():
    ops = [graphs.op("f", "", "", source=source) for source in SOURCES.values()]
    assert [module_of(op) for op in ops] == [op.source.module or TOP for op in ops]
    assert [place_of(op) for op in ops[:3]] == ["body.0", "body.0", "my model.py:12"] and place_of(ops[-1]) == TOP


@pytest.fixture
def model(tmp_path):
    """A model of a file whose name has spaces: `body` is planned, and `core` can only run as it is."""
    file = tmp_path / "my own model.py"
    file.write_text(
        textwrap.dedent("""\
            import torch
            from torch import nn


            class Core(nn.Module):
                def forward(self, x):
                    return x * x[x > 0].sum()


            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.body, self.core = nn.ModuleList([nn.Linear(4, 4)]), Core()

                def forward(self, x, is_opaque=True):
                    x = torch.tanh(self.body[0](x))
                    return (self.core(x) if is_opaque else x).sum()
        """)
    )
    spec = importlib.util.spec_from_file_location("my_own_model", file)
    home = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(home)
    torch.manual_seed(0)
    return home.Net()


def test_a_line_of_a_file_whose_name_has_spaces_is_its_own(model):
    joint = capture(model, (torch.randn(3, 4), False))
    found = {str(node.target): joint.sources[node.name] for node in joint.graph.nodes if node.op == "call_function"}
    assert found["aten.tanh.default"] == Source("", "my own model.py", 16)
    assert found["aten.addmm.default"] == Source("body.0", "my own model.py", 16)
    assert found["aten.tanh_backward.default"] == found["aten.tanh.default"]


def test_a_submodule_in_it_that_cannot_be_captured_runs_as_it_is(model):
    planned = plan(model, 1.0, (torch.randn(3, 4),), **QUICK)
    assert {op.source for op in planned.plan.graph.ops if op.name == "opaque_forward"} == {Source("core", note="runs as it is")}


def test_an_exported_file_names_its_lines(model, tmp_path):
    export_source(plan(model, 1.0, (torch.randn(3, 4), False), **QUICK), tmp_path / "step.py")
    assert "# body.0  my own model.py:16" in (tmp_path / "step.py").read_text()
