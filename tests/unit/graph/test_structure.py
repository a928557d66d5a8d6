"""The fingerprint of a graph is of its structure: names do not count, everything that a kernel computes does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.graph.graph import Graph, Kind, Value
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.source import Source
from planner.graph.structure import fingerprint, first_difference, renamed, wiring
from tests.support import graphs


def known(graph: Graph) -> Graph:
    """With a kernel and arguments for every op, as captured graphs have them."""
    ops = (replace(op, kernel=f"aten.{op.name}", arguments=f"%0:float32[{i}], 2.0") for i, op in enumerate(graph.ops))
    return replace(graph, ops=tuple(ops))


def other_names(graph: Graph) -> Graph:
    """The same structure; every op, node and value is called otherwise."""

    def new(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{name}_other" for name in names)

    ops = (
        replace(
            op,
            name=f"{op.name}_other",
            nodes=new(op.nodes),
            reads=new(op.reads),
            writes=new(op.writes),
            source=Source("", "b.py", 3),
        )
        for op in graph.ops
    )
    return Graph(
        tuple(ops),
        tuple(replace(value, name=f"{value.name}_other") for value in graph.values),
        new(graph.inputs),
        new(graph.forward_outputs),
        new(graph.backward_outputs),
        graph.num_forward_ops,
    )


def with_op(graph: Graph, i: int, **fields: object) -> Graph:
    return replace(graph, ops=(*graph.ops[:i], replace(graph.ops[i], **fields), *graph.ops[i + 1 :]))  # type: ignore[arg-type]


def with_value(graph: Graph, name: str, **fields: object) -> Graph:
    values = (replace(value, **fields) if value.name == name else value for value in graph.values)  # type: ignore[arg-type]
    return replace(graph, values=tuple(values))


def reserving(graph: Graph) -> Graph:
    given = Value("(optimizer)", 50, Kind.RESERVED)
    return replace(graph, values=(given, *graph.values), inputs=(given.name, *graph.inputs))


@pytest.mark.parametrize("make", graphs.SMALL.values(), ids=graphs.SMALL)
def test_names_do_not_count(make) -> None:
    graph = known(make())
    other = other_names(graph)
    assert other != graph and fingerprint(other) == fingerprint(graph) and wiring(other) == wiring(graph)
    assert renamed(graph, other) == other and renamed(other, graph) == graph


def test_what_is_measured_or_set_aside_does_not_count() -> None:
    graph = known(graphs.two_outputs())
    for other in (
        with_op(graph, 1, cost_ns=77),
        with_op(graph, 1, workspace_bytes=77),
        with_op(graph, 1, source=Source("", "elsewhere.py", 3)),
        with_value(graph, "e", nbytes=40, hidden_bytes=32),
        reserving(graph),
    ):
        assert other != graph and fingerprint(other) == fingerprint(graph)
    peaks = [simulate(one, keep_all(one)).peak_bytes for one in (graph, reserving(graph))]
    assert peaks[1] == peaks[0] + 50


BASE = known(graphs.two_outputs())
DIFFERENT = {
    "a kernel": (with_op(BASE, 1, kernel="aten.relu.default"), "op f1 () of the plan is aten.f1 where the model has aten.relu"),
    "a scalar": (
        with_op(BASE, 1, arguments="%0:float32[1], 3.0"),
        "op f1 (), aten.f1, is called with %0:float32[1], 2.0 in the plan and %0:float32[1], 3.0 in the model",
    ),
    "a shape": (with_op(BASE, 1, arguments="%0:float32[9], 2.0"), "float32[9], 2.0 in the model"),
    "bytes of a result": (with_value(BASE, "e", nbytes=9), "e has 8 bytes in the plan and 9 in the model"),
    "bytes of a parameter": (with_value(BASE, "w", nbytes=9), "w has 2 bytes in the plan and 9 in the model"),
    "a kind": (with_value(BASE, "w", kind=Kind.BUFFER), "the plan has 1 parameter, the model 0"),
    "what is read": (with_op(BASE, 2, reads=("x",)), "op f2 () of the plan reads a where the model's f2 reads x"),
    "which of two is read": (with_op(BASE, 4, reads=("a", "t1")), "reads e, t1 where the model's b3 reads a, t1"),
    "the order of reads": (with_op(BASE, 5, reads=("ge", "a")), "op b2 () of the plan reads a, ge where the model's"),
    "the order of results": (with_op(BASE, 7, writes=("dx", "dw")), "their inputs or outputs differ"),
    "whether it may run again": (with_op(BASE, 1, recomputable=False), "may run again in the plan and cannot run again in the"),
    "the order of outputs": (replace(BASE, forward_outputs=("loss", "hidden")), "their inputs or outputs differ"),
    "an output": (replace(BASE, forward_outputs=("loss",)), "their inputs or outputs differ"),
    "the order of gradients": (replace(BASE, backward_outputs=("dx", "dw")), "their inputs or outputs differ"),
}


@pytest.mark.parametrize(("other", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_structure_counts_and_the_first_difference_is_said(other: Graph, said: str) -> None:
    assert fingerprint(other) != fingerprint(BASE)
    assert fingerprint(other_names(other)) != fingerprint(BASE)
    assert said in first_difference(BASE, other)


def test_ops_that_are_missing_are_counted() -> None:
    last = BASE.ops[-1]
    again = Value("again", 1, Kind.GRADIENT)
    longer = replace(BASE, ops=(*BASE.ops, replace(last, name="again", writes=("again",))), values=(*BASE.values, again))
    assert first_difference(BASE, longer) == "the plan has 8 ops, the model 9"


def test_what_the_user_knows_of_a_call_comes_first() -> None:
    formed = with_value(with_value(BASE, "x", form="float32[8, 2]"), "w", form="float32[2, 2]")
    other_batch = with_op(with_value(formed, "x", form="float32[4, 2]", nbytes=1), 1, kernel="aten.relu.default")
    assert first_difference(formed, other_batch) == "input 0 is float32[8, 2] in the plan and float32[4, 2] in the model"
    other_width = with_op(with_value(formed, "w", form="float32[4, 2]", nbytes=1), 1, kernel="aten.relu.default")
    assert first_difference(formed, other_width) == "parameter 0 is float32[2, 2] in the plan and float32[4, 2] in the model"
    cast = with_op(formed, 1, kernel="aten._to_copy.default", arguments="%0:float32[1], dtype=bfloat16")
    assert first_difference(formed, cast).startswith("the plan casts nothing and the model casts to bfloat16: apply it under")
    assert first_difference(cast, formed).startswith("the plan casts to bfloat16 and the model casts nothing")
    frozen = replace(BASE, backward_outputs=("dx",))
    assert first_difference(BASE, frozen) == "2 parameters and inputs get a gradient in the plan, 1 in the model"


def test_long_arguments_are_shown_where_they_part() -> None:
    one, other = (with_op(BASE, 1, arguments="%0:float32[4], " * 50 + scalar + ", True" * 50) for scalar in ("0.5", "0.25"))
    said = first_difference(one, other)
    assert "0.5, True" in said and "0.25, True" in said and len(said) < 250
