"""Save the generator's state before every random kernel of the forward, so that a recompute draws the same."""

from __future__ import annotations

import torch

from planner.kernels import custom
from planner.tracer.passes.graph import TracedGraph


def save_rng_states(traced: TracedGraph) -> None:
    """Put an `rng_state` node before each, and note the pairs in `rng_states`."""
    graph, device = traced.graph, traced.device
    state_bytes = torch.get_rng_state().numel() if device.type == "cpu" else 0  # a CUDA generator's state is in host memory
    for node in list(graph.nodes):
        if node.op == "call_function" and traced.draws(node):
            with graph.inserting_before(node):
                state = graph.call_function(custom.rng_state, (device,))
            state.meta["val"] = torch.empty(state_bytes, dtype=torch.uint8, device="meta")
            traced.rng_states[node] = state
        if node is traced.last_forward:
            break
