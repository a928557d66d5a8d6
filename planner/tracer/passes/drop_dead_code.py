"""Remove kernels whose results are not read, unless they do more than return results."""

from __future__ import annotations

from torch import fx

from planner.kernels import custom
from planner.kernels.observed import is_foreign
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.raising import raises


def drop_dead_code(traced: TracedGraph) -> None:
    """Keep random draws, opaque modules, kernels that may raise, and operators that are not torch's: eager runs them too."""

    def has_effects(node: fx.Node) -> bool:
        if node.op in ("placeholder", "output") or node.target is custom.opaque_forward or traced.draws(node) or raises(node):
            return True
        return node.op == "call_function" and is_foreign(node.target)

    traced.graph.eliminate_dead_code(is_impure_node=has_effects)
