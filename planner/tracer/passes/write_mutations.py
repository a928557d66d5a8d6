"""Write into buffers and inputs by `copy_` nodes, placed so that every read sees the value that eager reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from planner.kernels import custom
from planner.kernels.batch_norm import statistics, unread_in_backward, updates_statistics
from planner.tracer.opaque.call import OpaqueCall
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import Storages

aten = torch.ops.aten


def write_mutations(traced: TracedGraph) -> None:
    """Write every mutation after the forward's last read of the old value, and take it from the results.

    Backward kernels that read the old value get a copy of it, made before the write. Every input that is written into, by these
    nodes or inside of other kernels, is noted as mutated.
    """
    mutations = traced.mutations
    for placeholder, new in mutations:
        _write(traced, placeholder, new)
    for node in (*(placeholder for placeholder, _ in mutations), *_written_inside(traced)):
        traced.inputs[node] = replace(traced.inputs[node], mutated=True)
    kept = [(role, node) for role, node in zip(traced.roles, traced.results, strict=True) if role[0] != "mutation"]
    traced.results = [node for _, node in kept]
    traced.roles = [role for role, _ in kept]


def _write(traced: TracedGraph, placeholder: fx.Node, new: fx.Node) -> None:
    graph = traced.graph
    storages = Storages(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    end = order[traced.last_forward] if traced.last_forward is not None else -1
    users = [n for n in graph.nodes if n.op == "call_function" and _reads(storages, n, placeholder.name)]
    kernels = [n for n in users if not storages.is_view(n)]
    last = max([new, *(n for n in kernels if order[n] <= end)], key=order.__getitem__)
    ends_forward = order[last] >= end
    if last.op == "placeholder":
        last = list(graph.find_nodes(op="placeholder"))[-1]
    late = [n for n in kernels if order[n] > end and placeholder not in unread_in_backward(n)]
    if late:
        last = _copy_old_value(traced, storages, placeholder, last, late)
    with graph.inserting_after(last):
        write = graph.call_function(aten.copy_.default, (placeholder, new))
    write.meta["val"] = placeholder.meta["val"]
    if ends_forward:
        traced.last_forward = write


def _copy_old_value(
    traced: TracedGraph, storages: Storages, placeholder: fx.Node, place: fx.Node, late: list[fx.Node]
) -> fx.Node:
    """A copy of the old value after `place`, which the `late` kernels read instead."""
    graph = traced.graph
    with graph.inserting_after(place):
        old = graph.call_function(aten.clone.default, (placeholder,))
    old.meta["val"] = placeholder.meta["val"].clone()
    for node in late:
        with graph.inserting_before(node):
            for arg in node.all_input_nodes:
                if storages.root.get(arg) == placeholder.name:
                    node.replace_input_with(arg, _rebased(traced, arg, placeholder, old))
    return old


def _reads(storages: Storages, node: fx.Node, name: str) -> bool:
    return any(storages.root.get(arg) == name for arg in node.all_input_nodes)


def _rebased(traced: TracedGraph, node: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """The view `node` of `old`, taken of `new` instead."""
    if node is old:
        return new
    bases = {arg: _rebased(traced, arg, old, new) for arg in node.all_input_nodes}
    copy = traced.graph.node_copy(node, bases.__getitem__)
    traced.copy_facts(copy, node)
    return copy


def _written_inside(traced: TracedGraph) -> Iterator[fx.Node]:
    """Placeholders that opaque modules write into, and kernels whose schemas do not say so."""
    for node in traced.graph.find_nodes(op="call_function", target=custom.opaque_forward):
        yield from _written_by(node, traced.calls[str(node.args[0])])
    for node in traced.graph.nodes:
        if updates_statistics(node):
            yield from (arg for arg in statistics(node) if arg.op == "placeholder")


def _written_by(node: fx.Node, call: OpaqueCall) -> Iterator[fx.Node]:
    names = (*(weight for weight, _ in call.weights), *call.buffers)
    given = node.args[1][len(call.arguments) :]  # type: ignore[index]
    yield from (tensor for name, tensor in zip(names, given, strict=True) if name in call.mutates)  # type: ignore[misc, arg-type]
