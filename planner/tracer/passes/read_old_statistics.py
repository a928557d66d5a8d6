"""Pass the buffers to batch norm's backward instead of the updated running statistics; it reads neither."""

from __future__ import annotations

from planner.kernels.batch_norm import KERNELS, source_of_statistic, statistics, training_kernel, with_statistics
from planner.tracer.passes.graph import TracedGraph


def read_old_statistics(traced: TracedGraph) -> None:
    """Undo a read that functionalization added: it would keep the updated statistics alive and the forward kernel from being
    recomputed."""
    for target in [target for target, kernel in KERNELS.items() if kernel.is_backward]:
        for node in traced.graph.find_nodes(op="call_function", target=target):
            forwards = [source_of_statistic(arg) for arg in statistics(node)]
            if training_kernel(node) is not None and len(forwards) == 2 and all(forwards):
                mean, variance = (statistics(norm)[i] for i, norm in enumerate(forwards) if norm is not None)
                node.args = with_statistics(node, mean, variance)
