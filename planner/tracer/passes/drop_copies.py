"""Remove copies of tensors that are never overwritten."""

from __future__ import annotations

import torch

from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import Storages, mutates

aten = torch.ops.aten


def drop_copies(traced: TracedGraph) -> None:
    """Read the original in place of its copy.

    Autograd copies what an in-place kernel overwrites and the backward reads (`silu_`, `clamp_`, ...). The graph has no such
    writes, so the original is still there. Kept: copies that are returned, written into, or smaller than the storage they are
    copied from, which they let go.
    """
    graph = traced.graph
    storages = Storages(graph)
    made = {name: nbytes for names in storages.writes.values() for name, nbytes in names}
    written = [arg for node in graph.nodes if mutates(node) for arg in node.all_input_nodes]
    kept = {storages.root[node] for node in (*traced.results, *written) if node in storages.root}
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        original = copy.args[0]
        name, val, like = storages.root[original], original.meta["val"], copy.meta["val"]
        same = val.stride() == like.stride() and made.get(name) == made[copy.name]
        if same and kept.isdisjoint((name, copy.name)):
            copy.replace_all_uses_with(original)
            graph.erase_node(copy)
