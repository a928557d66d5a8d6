"""A template in the joint graph: its nodes, its gates, and whether they can be copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat.fx_graphs import results
from planner._compat.joint_export import ExportedJoint
from planner._compat.tensors import storage_id
from planner.tracer.units.refused import Refused
from planner.tracer.units.standin import Kind, gates

Role = tuple[Any, ...]


@dataclass(slots=True)
class SplicedGraph:
    """A traced joint graph while stand-ins are replaced.

    Attributes:
        graph: changed.
        roles: of the graph's results, in order.
        role_of: placeholder -> its role.
        placeholder: qualified name of a parameter or buffer, every one of its names -> placeholder.
    """

    graph: fx.Graph
    roles: list[Role]
    role_of: dict[fx.Node, Role]
    placeholder: dict[str, fx.Node]

    @classmethod
    def of(cls, exported: ExportedJoint, names: Mapping[str, str], aliases: Mapping[str, str]) -> SplicedGraph:
        """A traced joint graph.

        Args:
            names: the model's parameters' and buffers' names by the names in `exported`.
            aliases: second names of them.
        """
        graph = exported.graph_module.graph
        role_of = dict(zip(graph.find_nodes(op="placeholder"), exported.inputs, strict=True))
        placeholder = {names[role[1]]: node for node, role in role_of.items() if role[0] in ("param", "buffer")}
        placeholder.update((other, placeholder[name]) for other, name in aliases.items())
        return cls(graph, list(exported.outputs), role_of, placeholder)

    def weights(self, unit: str) -> dict[str, fx.Node]:
        """Placeholders of a unit's parameters and buffers, by their names in it."""
        start = f"{unit}."
        return {name[len(start) :]: node for name, node in self.placeholder.items() if name.startswith(start)}

    def gradient_at(self, placeholder: fx.Node) -> int:
        """Where the gradient of an input stands among the graph's results."""
        return self.roles.index(("gradient", *self.role_of[placeholder]))


@dataclass(slots=True)
class Gates:
    """The nodes of one side's gates by position; None where nothing passes."""

    forward: list[fx.Node | None]
    backward: list[fx.Node | None]

    def __iter__(self) -> Iterator[fx.Node]:
        return (node for node in (*self.forward, *self.backward) if node is not None)


@dataclass(slots=True)
class Template:
    """The part of the joint graph that belongs to a template.

    Attributes:
        name: the unit's.
        arguments, results: its gates.
        forward, backward: the nodes between them, in order.
        weights: placeholders of its parameters and buffers, by their names in it.
        new_buffers: buffer's name -> what the forward writes into it.
    """

    name: str
    arguments: Gates
    results: Gates
    forward: list[fx.Node]
    backward: list[fx.Node]
    weights: dict[str, fx.Node]
    new_buffers: dict[str, fx.Node]


def cut(joint: SplicedGraph, kind: Kind) -> Template:
    """Find a template's part of the graph.

    Raises:
        Refused: what is between its gates depends on more than its arguments and weights, or is read outside.
    """
    found = gates(joint.graph)
    arguments = _gates(found, kind.template, "argument", kind.num_arguments)
    returned = _gates(found, kind.template, "result", len(kind.results))
    nodes = list(joint.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    marked = {*arguments, *returned}
    starts, ends = [[order[n] for n in side if n is not None] for side in (arguments.forward, returned.forward)]
    incoming, outgoing = [[order[n] for n in side if n is not None] for side in (returned.backward, arguments.backward)]
    if not (starts and ends and incoming and outgoing):
        raise Refused(f"{kind.template}: no gradient passes through it", kind.template)
    forward = [node for node in nodes[min(starts) : max(ends)] if node not in marked]
    # kernels of outer code that read the gradient of an argument before the block's backward has ended
    reached = {node for node in arguments.backward if node is not None}
    backward = []
    for node in nodes[min(incoming) + 1 : max(outgoing)]:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
        elif node not in marked:
            backward.append(node)
    weights = joint.weights(kind.template)
    new_buffers = {
        name: node
        for role, node in zip(joint.roles, results(joint.graph), strict=True)
        for name, placeholder in weights.items()
        if role == ("mutation", *joint.role_of[placeholder])
    }
    template = Template(kind.template, arguments, returned, forward, backward, weights, new_buffers)
    _check_closed(joint, template)
    _check_storages(template)
    _check_sums(template)
    return template


def _gates(found: Mapping[tuple[str, str, int], Sequence[fx.Node]], name: str, side: str, count: int) -> Gates:
    pairs = [found.get((name, side, i), ()) for i in range(count)]
    if any(len(pair) > 2 for pair in pairs):
        raise Refused(f"{name}: a gate is traced more than twice", name)
    return Gates([pair[0] if pair else None for pair in pairs], [pair[1] if len(pair) > 1 else None for pair in pairs])


def _check_closed(joint: SplicedGraph, template: Template) -> None:
    """Raise Refused where nodes of a template read from, or are read, outside otherwise than through its gates."""
    name, own = template.name, set(template.weights.values())
    between = (*template.forward, *template.backward)
    entering = {node for node in (*template.arguments.forward, *template.results.backward) if node is not None}
    inside = {*between, *entering}
    leaving = {*template.arguments, *template.results}
    output = joint.graph.output_node()
    returned = results(joint.graph)
    allowed = {returned[joint.gradient_at(node)] for node in own if joint.role_of[node][0] == "param"}
    allowed |= {*template.new_buffers.values()}
    for node in between:
        if node.op != "call_function":
            raise Refused(f"{name}: it reads a constant tensor", name)
        outer = next((arg for arg in node.all_input_nodes if arg not in inside and arg not in own), None)
        if outer is not None:
            raise Refused(f"{name}: {node.target} reads {outer} from outside", name)
        reader = next((user for user in node.users if user not in inside and user not in leaving), None)
        if reader is not None and not (reader is output and node in allowed):
            raise Refused(f"{name}: {node.target} is read outside, by {reader}", name)
    for node in own:
        if joint.role_of[node][0] == "param" and any(user not in inside and user is not output for user in node.users):
            raise Refused(f"{name}: a parameter of it is read outside", name)


def _check_storages(template: Template) -> None:
    """Raise Refused where what it returns, or a gradient of it, is a view of what it is given, or of another one."""
    given = {storage_id(n.meta["val"]) for n in (*template.arguments.forward, *template.weights.values()) if n is not None}
    made = [storage_id(gated(node).meta["val"]) for node in template.results.forward if node is not None]
    if given.intersection(made) or len(set(made)) < len(made):
        raise Refused(f"{template.name}: it returns a view of what it is given, or of another result", template.name)
    incoming = {storage_id(node.meta["val"]) for node in template.results.backward if node is not None}
    handed = [storage_id(gated(node).meta["val"]) for node in template.arguments.backward if node is not None]
    if incoming.intersection(handed) or len(set(handed)) < len(handed):
        raise Refused(f"{template.name}: an argument's gradient is a view of a result's, or of another's", template.name)


def _check_sums(template: Template) -> None:
    """Raise Refused where the gate has changed the order in which autograd adds gradients of an argument."""
    for node in template.arguments.backward:
        if node is not None and any(adds_behind(user, node, gated(node)) for user in node.users):
            raise Refused(f"{template.name}: {OTHER_ORDER}", template.name)


OTHER_ORDER = "its argument is read elsewhere too and that gradient comes first: autograd adds in another order"


def adds_behind(user: fx.Node, term: fx.Node, made: fx.Node) -> bool:
    """`user` adds `term`, itself a sum, to what came before: without a gate, each of its summands is added to that in turn."""
    add = torch.ops.aten.add.Tensor
    return user.target is add and user.args[1] is term and made.target is add


def gated(node: fx.Node) -> fx.Node:
    """What a gate's node lets pass."""
    passed = node.args[0]
    assert isinstance(passed, fx.Node)
    return passed
