"""Writes into buffers and inputs: `copy_` nodes of their own, placed so that no read sees the wrong value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from planner.tracer.parts import written_by_parts
from planner.tracer.storage import Storages, items

aten = torch.ops.aten

# Kernels that update running statistics (arguments 3 and 4) in place in training mode (argument 5),
# though their schemas do not say so.
_HIDDEN = tuple(getattr(aten, name).default for name in ("cudnn_batch_norm", "miopen_batch_norm"))

# Kernels whose other results do not depend on the running statistics they read: they may run again
# after the update. Their results 3 and 4, the new statistics, then have no readers.
_STATISTICS_BLIND = (aten._native_batch_norm_legit_functional.default,)


def updates_statistics(node: fx.Node) -> bool:
    """Batch norm in training mode that writes its running statistics behind the graph's back."""
    return node.target in _HIDDEN and node.args[5] is True


def hidden_mutations(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders that such kernels, and opaque parts, write into."""
    yield from written_by_parts(graph)
    for node in graph.nodes:
        if updates_statistics(node):
            yield from (arg for arg in node.args[3:5] if isinstance(arg, fx.Node) and arg.op == "placeholder")


def blind_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """Arguments whose values a second run of the kernel need not see as they were."""
    if node.target in _STATISTICS_BLIND + _HIDDEN and node.args[5] is True:
        return tuple(arg for arg in node.args[3:5] if isinstance(arg, fx.Node))
    return ()


def new_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The results of a kernel that are the updated running statistics, where it hands them out."""
    if node.target not in _STATISTICS_BLIND:
        return ()  # those that write in place return other things in these places, for the backward
    return tuple(item for item in items(node) if item.args[1] in (3, 4))


def write_mutations(
    graph: fx.Graph, mutations: Sequence[tuple[fx.Node, fx.Node]], last_forward: fx.Node | None
) -> fx.Node | None:
    """Add a `copy_` for every (placeholder, new value), after the forward's last read of the old value.

    Backward kernels that read the old value get a copy of it, made before the write. Returns the
    forward's last node.
    """
    for placeholder, new in mutations:
        storages = Storages(graph)
        order = {node: i for i, node in enumerate(graph.nodes)}
        end = order[last_forward] if last_forward is not None else -1
        users = [n for n in graph.nodes if n.op == "call_function" and _reads(storages, n, placeholder.name)]
        kernels = [n for n in users if not storages.is_view(n)]
        last = max([new, *(n for n in kernels if order[n] <= end)], key=order.__getitem__)
        ends_forward = order[last] >= end
        if last.op == "placeholder":
            last = list(graph.find_nodes(op="placeholder"))[-1]
        late = [n for n in kernels if order[n] > end and placeholder not in blind_arguments_backward(n)]
        if late:
            with graph.inserting_after(last):
                old = graph.call_function(aten.clone.default, (placeholder,))
            old.meta["val"] = placeholder.meta["val"].clone()
            for node in late:
                with graph.inserting_before(node):
                    for arg in node.all_input_nodes:
                        if storages.root.get(arg) == placeholder.name:
                            node.replace_input_with(arg, _rebased(graph, arg, placeholder, old))
            last = old
        with graph.inserting_after(last):
            write = graph.call_function(aten.copy_.default, (placeholder, new))
        write.meta["val"] = placeholder.meta["val"]
        if ends_forward:
            last_forward = write
    return last_forward


def blind_arguments_backward(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running statistics that a training-mode batch norm backward is handed and does not read."""
    if node.target is aten.native_batch_norm_backward.default and node.args[7] is True:
        return tuple(arg for arg in node.args[3:5] if isinstance(arg, fx.Node))
    return ()


def _reads(storages: Storages, node: fx.Node, name: str) -> bool:
    return any(storages.root.get(arg) == name for arg in node.all_input_nodes)


def _rebased(graph: fx.Graph, node: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """The view `node` of `old`, taken of `new` instead."""
    if node is old:
        return new
    bases = {arg: _rebased(graph, arg, old, new) for arg in node.all_input_nodes}
    copy = graph.node_copy(node, bases.__getitem__)
    copy.meta["val"] = node.meta["val"]
    return copy
