"""Refuse graphs that no schedule could run exactly."""

from __future__ import annotations

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import HigherOrderOperator
from planner._compat.fx_graphs import results
from planner.errors import CaptureError
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import ancestors, mutates


def refuse_unplannable(traced: TracedGraph) -> None:
    """Raise for a graph that cannot be planned; it is not changed.

    Raises:
        CaptureError: names the operation and the user's line.
    """
    for role in traced.roles:
        if role[0] == "mutation" and role[1] == "param" and ("gradient", *role[1:]) in traced.roles:
            name = traced.inputs[traced.placeholders[role[1:]]].key
            raise CaptureError(f"the forward writes into the parameter {name}; make it a buffer")
        if role[0] == "mutation" and role[1] == "tangent":
            raise CaptureError("the backward writes into an incoming gradient")
    for node in traced.graph.nodes:
        _refuse_node(traced, node)
    _refuse_reads_of_what_changes(traced)


def _refuse_node(traced: TracedGraph, node: fx.Node) -> None:
    source = traced.source(node)
    if node.op == "call_function" and mutates(node):
        raise CaptureError(
            f"{node.target} at {source} writes into a tensor in place, and functionalization did not remove the write: "
            "compute a new tensor instead",
            module=source.module,
        )
    for tensor in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
            raise CaptureError(
                f"{node.target} at {source} makes a {str(tensor.layout).removeprefix('torch.')} tensor; "
                "only dense tensors can be planned (nn.Embedding: sparse=False)",
                module=source.module,
            )
    if isinstance(node.target, HigherOrderOperator) or node.op in ("call_module", "call_method"):
        raise CaptureError(
            f"{node.target} at {source} is a control-flow or higher-order operator; it cannot be planned", module=source.module
        )


def _refuse_reads_of_what_changes(traced: TracedGraph) -> None:
    """Where Python reads what the forward itself changes, the next call would read another value."""
    changed = [role[1:] for role in traced.roles if role[0] == "mutation"] + [("input", i) for i in traced.moving]
    names = {traced.placeholders[role].name for role in changed}
    values = results(traced.guards) if traced.guards is not None else ()
    for node, read in zip(values, traced.host_reads, strict=True):
        if any(needed.name in names for needed in ancestors([node])):
            raise CaptureError(
                f"the model's control flow at {read.source} reads a tensor that its own forward changes ({read.value} now); "
                "a plan holds for one value of it",
                module=read.source.module,
            )
