"""Remove the tensors whose values Python read from the results; a separate graph computes them before a planned call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from planner._compat.fx_graphs import results
from planner.errors import CaptureError
from planner.tracer.joint import HostRead
from planner.tracer.opaque.traced import is_traced_call
from planner.tracer.passes.graph import Role, TracedGraph
from planner.tracer.storage import ancestors
from planner.tracer.trace_mode import TracedRead


def split_host_reads(traced: TracedGraph) -> None:
    """Fill `guards` and `host_reads`, and leave only the results that a step returns.

    A value that is computed from shapes alone is the same in every call of the plan, and is left out.

    Raises:
        CaptureError: a value depends on random numbers, or on what an opaque module returns.
    """
    pairs = list(zip(traced.roles, traced.results, strict=True))
    read = [node for role, node in pairs if _is_read(role, traced)]
    varying = [(node, seen) for node, seen in zip(read, traced.reads, strict=True) if not _is_constant(node, traced)]
    traced.guards = _guards(traced, varying)
    names = [node.name for node in results(traced.guards)] if traced.guards is not None else []
    traced.host_reads = tuple(HostRead(name, seen.value, seen.source) for name, (_, seen) in zip(names, varying, strict=True))
    kept = [(role, node) for role, node in pairs if node is not None and not _is_read(role, traced)]
    traced.results = [node for _, node in kept]
    traced.roles = [role for role, _ in kept]


def _is_read(role: Role, traced: TracedGraph) -> bool:
    return bool(role[0] == "output" and role[1] >= traced.num_results)


def _is_constant(node: fx.Node, traced: TracedGraph) -> bool:
    """Nothing that can change between calls goes into it."""
    return all(n.op == "call_function" and not traced.draws(n) for n in ancestors([node]))


def _guards(traced: TracedGraph, reads: Sequence[tuple[fx.Node, TracedRead]]) -> fx.Graph | None:
    """The subgraph that computes the tensors Python read, from the call's inputs alone."""
    if not reads:
        return None
    for node, read in reads:
        _check_computable(traced, node, read)
    needed = ancestors(node for node, _ in reads)
    guards = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node in needed:
            copies[node] = guards.node_copy(node, copies.__getitem__)
    guards.output(tuple(copies[node] for node, _ in reads))
    return guards


def _check_computable(traced: TracedGraph, node: fx.Node, read: TracedRead) -> None:
    found = ancestors([node])
    is_activation = any(n.op != "call_function" for n in found)  # not a draw that decides by itself
    for n in found:
        if n.op != "call_function" or not (traced.draws(n) or is_traced_call(n)):
            continue
        why = "random numbers" if traced.draws(n) else f"the opaque module {traced.calls[str(n.args[1])].module}"
        if traced.draws(n) and is_activation:
            why += ", by way of an activation"
        cure = "put the branch into a submodule of its own, which then runs as it is"
        if read.is_validation:
            cure = "set validate_args=False in torch.distributions there"
        raise CaptureError(
            f"{cure}: the model's control flow at {read.source} depends on {why} ({n.target} at {traced.source(n)})",
            module=read.source.module,
        )
