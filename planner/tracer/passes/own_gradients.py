"""Give every gradient a storage of its own, laid out as eager's is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from planner.graph.graph import Kind
from planner.kernels import custom
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import Storages


def own_gradients(traced: TracedGraph) -> None:
    """Copy a gradient that shares its storage or has other strides; the copy runs as soon as the gradient is there.

    The autograd engine takes a gradient of this form over as it is. That of a leaf it would copy itself if it had any other
    strides, at a time and of a size that no plan knows. That of an input which an earlier step computed goes on to that step
    with the strides that the last kernel gave it.
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
        root, stride = storages.root[node], _of_leaf(like)
        given = traced.inputs[placeholder]
        if given.kind is Kind.INPUT and val.stride() != stride:
            is_leaf = traced.leaves[int(given.key)]
            traced.inputs[placeholder] = replace(given, is_leaf=is_leaf)
            stride = stride if is_leaf else val.stride()
        if root in made and root not in taken and val.stride() == stride and val.dtype == like.dtype:
            taken.add(root)
            continue
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(custom.laid_out, (node, tuple(like.shape), tuple(stride)))
        _place_behind(traced, copy, node)
        copy.meta["val"] = torch.empty_strided(like.shape, stride, dtype=val.dtype, device="meta")
        returned[i] = copy
    traced.results = returned


def _of_leaf(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a leaf's gradient: its own where it is dense in its storage, else contiguous (torch's AccumulateGrad)."""
    is_dense = torch.empty_like(tensor).stride() == tensor.stride()
    return tuple(tensor.stride() if is_dense else torch.empty(tensor.shape, device="meta").stride())


def _place_behind(traced: TracedGraph, node: fx.Node, argument: fx.Node) -> None:
    """Run `node` as soon as its argument is there: where that is an input, as the first kernel of the backward."""
    last_input = list(traced.graph.find_nodes(op="placeholder"))[-1]
    place = argument if argument.op != "placeholder" else traced.last_forward or last_input
    place.append(node)
