"""Replace placeholders for kernels that may raise and return nothing by these kernels."""

from __future__ import annotations

from planner.tracer.passes.graph import TracedGraph
from planner.tracer.raising import in_forward, write_raising


def restore_raising_kernels(traced: TracedGraph) -> None:
    """Note those of the forward in `forward_checks`, then restore all of them."""
    traced.forward_checks = tuple(in_forward(traced.graph))
    write_raising(traced.graph)
