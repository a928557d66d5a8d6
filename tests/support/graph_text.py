"""Graphs as text: passes of the tracer are tested with the graph before and after, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from planner.tracer.joint import Input
from planner.tracer.kernel_text import kernel_name
from planner.tracer.passes.graph import TracedGraph


def traced_graph(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    *,
    roles: Sequence[Any] = (),
    inputs_are: Sequence[Any] = (),
    mode: str = "fake",
) -> TracedGraph:
    """The kernels that a function of tensors calls, as the passes take them.

    Args:
        roles: of its results; ("output", i) for the rest.
        inputs_are: (kind, role) of the inputs, as in `ExportedJoint`.
        mode: "real" for a function that holds tensors of its own.
    """
    graph = make_fx(function, tracing_mode=mode)(*inputs).graph
    placeholders = graph.find_nodes(op="placeholder")
    found = TracedGraph(graph)
    for node, (kind, role) in zip(placeholders, inputs_are, strict=False):
        found.placeholders[role] = node
        found.inputs[node] = Input(node.name, kind, role[1])
    returned = graph.output_node().args[0]
    found.results = returned if isinstance(returned, (list, tuple)) else (returned,)
    found.roles = [*roles, *(("output", i) for i in range(len(roles), len(found.results)))]
    return found


def text_of(graph: fx.Graph) -> str:
    """One line a node: "%2 = mul.Tensor(%0, %1)". Nodes are numbered: their names differ between torch releases."""
    numbers = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{numbers[node]} = input")
        elif node.op == "get_attr":
            lines.append(f"{numbers[node]} = attribute")
        elif node.op == "output":
            lines.append(f"return {', '.join(numbers[arg] for arg in node.all_input_nodes)}")
        else:
            args = [_argument(arg, numbers) for arg in node.args]
            args += [f"{name}={_argument(arg, numbers)}" for name, arg in node.kwargs.items()]
            name = kernel_name(node.target).removeprefix("aten.").removesuffix(".default").removeprefix("_operator.")
            lines.append(f"{numbers[node]} = {name}({', '.join(args)})")
    return "\n".join(lines)


def _argument(arg: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return numbers[arg]
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(_argument(item, numbers) for item in arg)}]"
    return str(arg).removeprefix("torch.")


def check_pass(run: Callable[[TracedGraph], None], traced: TracedGraph, side_by_side: str) -> None:
    """Run a pass, and compare the graph before and after it with two columns of text, separated by "|"."""
    before = text_of(traced.graph)
    run(traced)
    traced.graph.lint()
    rows = [row.split("|") for row in textwrap.dedent(side_by_side).strip().splitlines()]
    expected = ["\n".join(row[i].strip() for row in rows if row[i].strip()) for i in (0, 1)]
    assert before == expected[0], f"before the pass:\n{before}"
    assert text_of(traced.graph) == expected[1], f"after the pass:\n{text_of(traced.graph)}"
