"""Joint + Profile -> Graph: names and integers that the torch-free side plans with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from planner.graph.accumulation import accumulating, num_stages
from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value, reserved_name
from planner.graph.source import NOWHERE
from planner.kernels import custom
from planner.kernels.batch_norm import new_statistics, unread_in_recompute, updates_statistics
from planner.kernels.facts import is_collective, is_repeatable
from planner.profiler.profile import KernelCost, Profile
from planner.tracer.joint import Joint
from planner.tracer.kernel_text import CallTexts, kernel_name, tensor_text
from planner.tracer.opaque.call import draws, opaque_call_of
from planner.tracer.raising import raises
from planner.tracer.storage import Storages, items, mutates

_CUDA_BLOCK = 512
"""CUDA's allocator allocates multiples of this many bytes (torch docs, CUDA memory management)."""


def kernel_nodes(joint: Joint) -> list[fx.Node]:
    """The nodes that become ops, in graph order: what a profiler has to measure. Opaque modules were measured in capture."""
    storages = Storages(joint.graph)
    return [node for node in joint.graph.nodes if node in storages.writes and opaque_call_of(node, joint.opaque_calls) is None]


def lower(
    joint: Joint,
    profile: Profile | None = None,
    *,
    reserved: Mapping[str, int] | None = None,
    accumulate: int = 0,
    in_flight: int = 1,
) -> Graph:
    """The planner's Graph of a captured step.

    Args:
        joint: from `capture`.
        profile: costs by node name; without one every cost is 0 (enough to compare structures).
        reserved: bytes set aside, resident all the time, by what they are for ("optimizer state").
        accumulate: not 0 for a step that adds to gradients that are there, the maximum number of its backward stages.
        in_flight: forwards that have run when the first backward begins.
    """
    lowering = _Lowering(joint, profile)
    graph = replace(lowering.graph(reserved or {}), in_flight=in_flight)
    values, nbytes, owners = lowering.parameter_gradients()
    return accumulating(graph, values, nbytes, accumulate, owners) if accumulate else graph


def lower_like(joint: Joint, planned: Graph) -> Graph:
    """The Graph of a captured step, without costs, that counts what a plan's graph counts."""
    return lower(joint, accumulate=num_stages(planned), in_flight=planned.in_flight)


def accumulating_as_eager(joint: Joint, graph: Graph) -> Graph:
    """The graph of a captured step that adds each gradient, once it is there, to that of earlier micro-steps."""
    values, nbytes, _ = _Lowering(joint, None).parameter_gradients()
    return accumulating(graph, values, nbytes, None)


def never_recomputed(joint: Joint) -> dict[str, str]:
    """Forward ops that no plan runs twice, by name, and why. Those that save generator states, for others to run twice, are no
    such ops."""
    lowering = _Lowering(joint, None)
    forward = [
        node
        for node in lowering.nodes[: joint.num_forward_nodes]
        if node in lowering.storages.writes and node.target is not custom.rng_state
    ]
    return {node.name: why for node in forward if (why := lowering.why_once(node, forward=True))}


def backward_is_fixed(joint: Joint) -> bool:
    """Backward ops must run in captured order.

    One of them draws random numbers, writes into a tensor that lives on, communicates with other ranks (whose collectives must
    come in the same order), or is an operator that is not torch's and not known to be repeatable.
    """
    backward = [node for node in list(joint.graph.nodes)[joint.num_forward_nodes :] if node.op == "call_function"]
    return any(
        draws(node, joint.opaque_calls) or mutates(node) or is_collective(node) or not is_repeatable(node) for node in backward
    )


class _Lowering:
    def __init__(self, joint: Joint, profile: Profile | None) -> None:
        self.joint = joint
        self.costs = profile.costs if profile is not None else {}
        self.storages = Storages(joint.graph)
        self.texts = CallTexts(joint.graph, self.storages, joint.saved_handles)
        self.nodes = list(joint.graph.nodes)
        self.rounded = _CUDA_BLOCK if joint.device.type == "cuda" else 1
        mutated = {given.node for given in joint.inputs if given.mutated}
        self.mutated = {self.storages.root[node] for node in self.nodes if node.name in mutated}
        self.views: dict[str, list[str]] = {}
        for node in self.nodes:
            if self.storages.is_view(node) and node in self.storages.root:
                self.views.setdefault(self.storages.root[node], []).append(node.name)

    def graph(self, reserved: Mapping[str, int]) -> Graph:
        values = self._resident()
        values += [Value(reserved_name(purpose), self._bytes(nbytes), Kind.RESERVED) for purpose, nbytes in reserved.items()]
        resident = tuple(value.name for value in values if value.kind in RESIDENT_KINDS)
        by_name = {node.name: node for node in self.nodes}
        ops: list[Op] = []
        num_forward_ops = 0
        for position, node in enumerate(self.nodes):
            if node not in self.storages.writes:
                continue
            forward = position < self.joint.num_forward_nodes
            num_forward_ops += forward
            kind = Kind.ACTIVATION if forward else Kind.GRADIENT
            hidden = self.costs[node.name].hidden_bytes if node.name in self.costs else ()
            for i, (name, nbytes) in enumerate(self.storages.writes[node]):
                more = hidden[i] if i < len(hidden) else 0
                known, real = self._bytes(nbytes), self._bytes(nbytes + more)
                depends = name in self.joint.saved_handles  # it may depend on the data: not compared as structure
                form = "" if depends else _form(by_name.get(name))
                values.append(Value(name, real, kind, real if depends else real - known, form))
            ops.append(self._op(node, forward))
        made = {name for op in ops for name in op.writes}
        return Graph(
            ops=tuple(ops),
            values=tuple(values),
            inputs=resident,
            forward_outputs=self._roots([by_name[name] for name in self.joint.results], made),
            backward_outputs=self._roots([by_name[name] for _, name in self.joint.gradients], made),
            num_forward_ops=num_forward_ops,
            backward_is_fixed=backward_is_fixed(self.joint),
        )

    def parameter_gradients(self) -> tuple[list[str], int, list[str]]:
        """The values that hold the gradients of parameters, the bytes of these gradients, and the values of the parameters."""
        by_name = {node.name: node for node in self.nodes}
        nodes = [by_name[name] for given, name in self.joint.gradients if given.kind is Kind.PARAM]
        owners = [self.storages.root[by_name[given.node]] for given, _ in self.joint.gradients if given.kind is Kind.PARAM]
        return [self.storages.root[node] for node in nodes], sum(self._bytes(node.meta["val"].nbytes) for node in nodes), owners

    def _resident(self) -> list[Value]:
        by_name = {node.name: node for node in self.nodes}
        values = []
        for given in self.joint.inputs:
            node = by_name[given.node]
            if self.storages.root[node] == node.name:
                nbytes = self._bytes(node.meta["val"].untyped_storage().nbytes())
                values.append(Value(node.name, nbytes, given.kind, form=_form(node)))
        return values

    def _bytes(self, nbytes: int) -> int:
        return -(-nbytes // self.rounded) * self.rounded

    def _roots(self, nodes: list[fx.Node], made: set[str]) -> tuple[str, ...]:
        """Storages of output nodes; those that are resident anyway are left out."""
        return tuple(dict.fromkeys(self.storages.root[node] for node in nodes if self.storages.root[node] in made))

    def _op(self, node: fx.Node, forward: bool) -> Op:
        writes = tuple(name for name, _ in self.storages.writes[node])
        reads = [self.storages.root[arg] for arg in node.all_input_nodes if arg in self.storages.root]
        if node.name in self.joint.rng_states:
            reads.append(self.joint.rng_states[node.name])
        distinct = tuple(dict.fromkeys(reads))
        cost = self._cost(node)
        item_names = [item.name for item in items(node) if self.storages.root.get(item) in writes]
        return Op(
            name=node.name,
            nodes=tuple(
                dict.fromkeys((node.name, *item_names, *(view for name in writes for view in self.views.get(name, ()))))
            ),
            reads=distinct,
            writes=writes,
            cost_ns=cost.time_ns,
            workspace_bytes=self._bytes(cost.workspace_bytes),
            recomputable=not self.why_once(node, forward),
            source=self.joint.sources.get(node.name, NOWHERE),
            kernel=kernel_name(node.target),
            arguments=self.texts.arguments(node, distinct),
        )

    def _cost(self, node: fx.Node) -> KernelCost:
        call = opaque_call_of(node, self.joint.opaque_calls)
        if call is None:
            return self.costs.get(node.name, KernelCost(0, 0))
        return call.forward if node.target is custom.opaque_forward else call.backward

    def why_once(self, node: fx.Node, forward: bool) -> str:
        """Why a second execution may give other bits or change something; "" where it is sure not to."""
        if raises(node):
            return "checks a value, and may raise"
        if node.target is custom.rng_state:
            return "saves the generator's state"
        if mutates(node) and not updates_statistics(node):
            return "writes into a tensor that lives on"
        if is_collective(node):
            return "communicates with other ranks"
        call = opaque_call_of(node, self.joint.opaque_calls)
        if not is_repeatable(node) or (call is not None and not call.repeatable):
            return "did not give the same bits twice"
        if draws(node, self.joint.opaque_calls) and node.name not in self.joint.rng_states:
            return "draws random numbers whose state is not saved"
        unread = set(unread_in_recompute(node))
        # a kernel besides the buffers' update reads the new running statistics, which a second run would compute wrong
        if any(mutates(user) is False for item in new_statistics(node) for user in item.users):
            return "its new statistics are read by other kernels"
        read = {self.storages.root[arg] for arg in node.all_input_nodes if arg not in unread and arg in self.storages.root}
        if read & self.mutated:
            return "reads a tensor that the step writes into"
        return "" if forward else "runs in the backward"


def _form(node: fx.Node | None) -> str:
    """The dtype and shape of the tensor that a node makes; "" where it makes none, or where a value has no node."""
    tensor = None if node is None else node.meta.get("val")
    return tensor_text(tensor) if isinstance(tensor, torch.Tensor) else ""
