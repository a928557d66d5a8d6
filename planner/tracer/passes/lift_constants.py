"""Make the tensors that the graph holds as attributes inputs."""

from __future__ import annotations

import torch
from torch import fx

from planner._compat.fake_tensors import FakeTensor
from planner.errors import CaptureError
from planner.graph.graph import Kind
from planner.tracer.joint import Input
from planner.tracer.passes.graph import TracedGraph


def lift_constants(traced: TracedGraph) -> None:
    """Replace get_attr nodes by placeholders, so that a planned module's state_dict does not grow.

    Raises:
        CaptureError: the graph holds the body of a higher-order operator.
    """
    graph = traced.graph
    first = next(iter(graph.nodes))
    known: dict[int, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        tensor = getattr(graph.owning_module, node.target, None)
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(
                f"the graph holds {node.target}, a {type(tensor).__name__}: higher-order operators cannot be planned"
            )
        if id(tensor) in known:
            node.replace_all_uses_with(known[id(tensor)])
            graph.erase_node(node)
            continue
        number = len(traced.constants)
        with graph.inserting_before(first):
            placeholder = known[id(tensor)] = graph.placeholder(f"constant_{number}")
        placeholder.meta["val"] = _as_traced(tensor, node.meta.get("val", tensor))
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        traced.inputs[placeholder] = Input(placeholder.name, Kind.BUFFER, f"constant:{number}")
        traced.constants[placeholder] = tensor


def _as_traced(tensor: torch.Tensor, val: torch.Tensor) -> torch.Tensor:
    """The fake tensor that the trace used for a constant: views of it share its storage, not that of the node's own fake."""
    return val.fake_mode.from_tensor(tensor) if isinstance(val, FakeTensor) and not isinstance(tensor, FakeTensor) else val
