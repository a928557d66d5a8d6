"""What the passes work on: a traced joint graph, and tables of what is known of its nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner._compat.joint_export import ExportedJoint
from planner.graph.graph import Kind
from planner.graph.source import NOWHERE, Source
from planner.tracer.joint import HostRead, Input
from planner.tracer.node_marks import take_marks
from planner.tracer.opaque.call import OpaqueCall, draws
from planner.tracer.trace_mode import TracedRead

Role = tuple[Any, ...]
"""Of a placeholder or a result; see `planner._compat.joint_export.ExportedJoint`."""

_KINDS = {"param": Kind.PARAM, "buffer": Kind.BUFFER, "input": Kind.INPUT, "tangent": Kind.TANGENT}


@dataclass(slots=True, eq=False)
class TracedGraph:
    """A joint graph on its way to the normal form. Passes change it, and its tables, in place.

    Attributes:
        graph: placeholders, calls, and one output node.
        placeholders: by role.
        roles: one per result, in the order of the output node.
        inputs: by placeholder.
        device: where the step runs.
        num_results: how many results of the traced function are outputs; tensors that Python read follow them.
        reads: what Python read of each of those.
        leaves: per tensor leaf of the call, then per tensor of Python state, whether it is a leaf of autograd.
        uses: per placeholder, how many operations' gradients reach it; its gradient is their sum.
        moving: positions of the inputs whose place in Python state holds another tensor after the forward.
        calls: recorded calls of opaque modules, by key.
        sources: where in the user's code a node comes from.
        casts: for casts by autocast, the context in which eager caches them.
        constants: tensors that the model holds as plain attributes, by placeholder (filled by lift_constants).
        guards: graph of the tensors that Python read, None where it read none (split_host_reads).
        host_reads: what it read, in the order of the guards' outputs (split_host_reads).
        forward_checks: kernels of the forward that may raise and return nothing (restore_raising_kernels).
        saved_handles: results of opaque modules that hold their autograd graphs (write_opaque_kernels).
        last_forward: the forward's last call; None where it has none (order_forward, then write_mutations).
        rng_states: random kernel of the forward -> node that saves the generator's state before it (save_rng_states).
    """

    graph: fx.Graph
    placeholders: dict[Role, fx.Node] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    inputs: dict[fx.Node, Input] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_results: int = 0
    reads: Sequence[TracedRead] = ()
    leaves: Sequence[bool] = ()
    uses: dict[fx.Node, int] = field(default_factory=dict)
    moving: Collection[int] = ()
    calls: Mapping[str, OpaqueCall] = field(default_factory=dict)
    sources: dict[fx.Node, Source] = field(default_factory=dict)
    casts: dict[fx.Node, int] = field(default_factory=dict)
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    guards: fx.Graph | None = None
    host_reads: tuple[HostRead, ...] = ()
    forward_checks: tuple[fx.Node, ...] = ()
    saved_handles: set[fx.Node] = field(default_factory=set)
    last_forward: fx.Node | None = None
    rng_states: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @classmethod
    def of(
        cls, exported: ExportedJoint, names: Mapping[str, str], uses: Mapping[str | int, int] | None = None, **facts: Any
    ) -> TracedGraph:
        """Take over an exported graph, and what the trace noted on its nodes.

        Args:
            names: the model's parameter and buffer names by the names in `exported`.
            uses: as of `planner.tracer.trace.Trace`.
            facts: further attributes.
        """
        graph = exported.graph_module.graph
        sources, casts = take_marks(graph)
        placeholders = dict(zip(exported.inputs, graph.find_nodes(op="placeholder"), strict=True))
        inputs = {n: Input(n.name, _KINDS[role[0]], names.get(role[1], role[1])) for role, n in placeholders.items()}
        counts = {node: (uses or {}).get(given.key, 0) for node, given in inputs.items()}
        return cls(graph, placeholders, list(exported.outputs), inputs, sources=sources, casts=casts, uses=counts, **facts)

    @property
    def results(self) -> tuple[Any, ...]:
        """The nodes that the graph returns; None for an input without a gradient."""
        returned: Any = self.graph.output_node().args[0]
        return tuple(returned)

    @results.setter
    def results(self, nodes: Sequence[Any]) -> None:
        self.graph.output_node().args = (tuple(nodes),)

    @property
    def gradients(self) -> list[tuple[fx.Node, int]]:
        """(placeholder, position among the results) of every gradient."""
        return [(self.placeholders[role[1:]], i) for i, role in enumerate(self.roles) if role[0] == "gradient"]

    @property
    def mutations(self) -> list[tuple[fx.Node, fx.Node]]:
        """(placeholder, its new value) of every write that the forward makes."""
        pairs = zip(self.roles, self.results, strict=True)
        return [(self.placeholders[role[1:]], node) for role, node in pairs if role[0] == "mutation"]

    def source(self, node: fx.Node) -> Source:
        """Where a node comes from; NOWHERE for one that a pass made."""
        return self.sources.get(node, NOWHERE)

    def draws(self, node: fx.Node) -> bool:
        """The node draws random numbers."""
        return draws(node, self.calls)

    def copy_facts(self, node: fx.Node, like: fx.Node) -> None:
        """Note for a new node what is known of the one that it replaces."""
        node.meta = dict(like.meta)
        for table in (self.sources, self.casts):
            if like in table:
                table[node] = table[like]  # type: ignore[index, assignment]
