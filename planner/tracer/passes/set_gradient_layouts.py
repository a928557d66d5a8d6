"""Let incoming gradients whose strides were chosen have these strides; remove the nodes that chose them."""

from __future__ import annotations

from planner.tracer.passes.graph import TracedGraph
from planner.tracer.replay import is_incoming_gradient


def set_gradient_layouts(traced: TracedGraph) -> None:
    """Replace every `incoming_gradient` node by its argument, which has these strides at run time: nothing is copied."""
    for node in [node for node in traced.graph.nodes if is_incoming_gradient(node)]:
        gradient = node.args[0]
        gradient.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(gradient)
        traced.graph.erase_node(node)
