"""Replace traced calls of opaque modules by the kernels that run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planner.errors import CaptureError
from planner.graph.source import Source
from planner.kernels import custom
from planner.tracer.opaque.call import OpaqueCall, opaque_call_of
from planner.tracer.opaque.traced import BACKWARD, FORWARD
from planner.tracer.passes.graph import TracedGraph
from planner.tracer.storage import items


def write_opaque_kernels(traced: TracedGraph) -> None:
    """Write `custom.opaque_forward` and `custom.opaque_backward` nodes, and fill `saved_handles`.

    Raises:
        CaptureError: a module was traced as something that cannot run exactly.
    """
    graph, calls = traced.graph, traced.calls
    found = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=FORWARD)}
    for key, spec in calls.items():
        if key not in found:
            raise CaptureError(
                f"the results of the opaque module {spec.module} are not used, so its call is not in the graph: use them, "
                "or do not call it",
                module=spec.module,
            )
    for key, node in found.items():
        spec = calls[str(key)]
        node.target, node.args = custom.opaque_forward, (key, node.args[0])
        traced.sources[node] = _source(spec)
        traced.saved_handles |= {item for item in items(node) if item.args[1] == len(spec.results)}
    for node in graph.find_nodes(op="call_function", target=BACKWARD):
        grads, handle, read, key = node.args
        spec = calls[str(key)]
        node.target, node.args = custom.opaque_backward, (key, grads, handle, read, [None] * len(spec.differentiated))
        traced.sources[node] = _source(spec)
        node.args = (*node.args[:-1], _partial_sums(graph, node, spec))
    for node in found.values():
        _check_state(traced, node, calls[str(node.args[0])])


def _source(spec: OpaqueCall) -> Source:
    return Source(spec.module, note="runs as it is")


_SUMS = (torch.ops.aten.add.Tensor, custom.add_gradients)


def _partial_sums(graph: fx.Graph, node: fx.Node, spec: OpaqueCall) -> list[Any]:
    """Per gradient, the partial sum that it is added to, which the kernel then starts from; the node that adds them goes."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    sums: list[Any] = [None] * len(spec.differentiated)
    for item in list(items(node)):
        position = int(item.args[1])  # type: ignore[arg-type]
        added = [user for user in item.users if user.target in _SUMS and user.args[1] is item]
        earlier = added[0].args[0] if len(added) == len(item.users) == 1 else None
        if isinstance(earlier, fx.Node) and earlier is not item and order[earlier] < order[node]:
            sums[position] = earlier
            item.meta["val"] = added[0].meta["val"]  # the engine adds, and lays the sum out as that kernel does
            results = list(node.meta["val"])
            results[position] = item.meta["val"]
            node.meta["val"] = results
            added[0].replace_all_uses_with(item)
            graph.erase_node(added[0])
        if spec.differentiated[position] >= len(spec.arguments):
            for user in item.users:
                if user.target in _SUMS:
                    user.target = custom.add_gradients  # one of them may be None
    return sums


def _check_state(traced: TracedGraph, node: fx.Node, spec: OpaqueCall) -> None:
    """Raise CaptureError where a module's weights or buffers are used outside of it in a way that a plan cannot follow."""
    for i, given in enumerate(node.args[1][len(spec.arguments) :]):  # type: ignore[index,arg-type]
        assert isinstance(given, fx.Node)
        name = (*(w for w, _ in spec.weights), *spec.buffers)[i]
        others = [user for user in given.users if not _is_of(user, spec.module, traced)]
        if name in spec.mutates and others:
            raise CaptureError(
                f"{spec.module}.{name}, which the forward writes into, is read elsewhere too", module=spec.module
            )
        again = [user for user in given.users if user.target is custom.opaque_forward and user is not node]
        cast = [user for user in given.users if user in traced.casts]
        if spec.autocast[0] and i < len(spec.weights) and spec.weights[i][1] and (again or cast):
            raise CaptureError(
                f"{spec.module}.{name} is cast by autocast in several places, where eager shares the cast", module=spec.module
            )


def _is_of(node: fx.Node, module: str, traced: TracedGraph) -> bool:
    """The node is a call of this opaque module, forward or backward."""
    call = opaque_call_of(node, traced.calls)
    return call is not None and call.module == module
