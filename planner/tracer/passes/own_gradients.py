"""Give every gradient a storage of its own, laid out like its input."""

from __future__ import annotations

import torch
from torch import fx

from planner.kernels import custom
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import Storages


def own_gradients(traced: TracedGraph) -> None:
    """Copy a gradient that shares its storage or has other strides; the copy runs as soon as the gradient is there.

    The autograd engine takes a gradient of this form over as it is. It would copy any other one itself, at a time and of a size
    that no plan knows.
    """
    graph, gradients = traced.graph, traced.gradients
    storages = Storages(graph)
    returned = list(traced.results)
    made = {name for names in storages.writes.values() for name, _ in names}
    positions = {i for _, i in gradients}
    taken = {storages.root[node] for i, node in enumerate(returned) if i not in positions}
    for placeholder, i in gradients:
        node, like = returned[i], placeholder.meta["val"]
        val = node.meta["val"]
        root = storages.root[node]
        if root in made and root not in taken and val.stride() == like.stride() and val.dtype == like.dtype:
            taken.add(root)
            continue
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(custom.laid_out, (node, tuple(like.shape), tuple(like.stride())))
        _place_behind(traced, copy, node)
        copy.meta["val"] = torch.empty_strided(like.shape, like.stride(), dtype=val.dtype, device="meta")
        returned[i] = copy
    traced.results = returned


def _place_behind(traced: TracedGraph, node: fx.Node, argument: fx.Node) -> None:
    """Run `node` as soon as its argument is there: where that is an input, as the first kernel of the backward."""
    last_input = list(traced.graph.find_nodes(op="placeholder"))[-1]
    place = argument if argument.op != "placeholder" else traced.last_forward or last_input
    place.append(node)
