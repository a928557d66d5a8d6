"""Remove detach and alias nodes: planned graphs run without autograd, where these do nothing."""

from __future__ import annotations

import torch

from planner.tracer.passes.graph import TracedGraph

aten = torch.ops.aten


def drop_detach(traced: TracedGraph) -> None:
    """Read the argument in place of each."""
    for target in (aten.detach.default, aten.alias.default):
        for node in traced.graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
