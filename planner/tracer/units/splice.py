"""Copies of templates in the places of stand-ins."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.fx_graphs import IS_GRADIENT_SUM, results
from planner._compat.joint_export import ExportedJoint
from planner._compat.tensors import storage_id
from planner._compat.units import fake_view
from planner.kernels import observed
from planner.tracer.node_marks import marks_of_copy
from planner.tracer.units.choice import Form
from planner.tracer.units.refused import Refused
from planner.tracer.units.standin import MARK as GATE
from planner.tracer.units.standin import Kind, UnitCall, stand_ins
from planner.tracer.units.template import OTHER_ORDER, SplicedGraph, Template, adds_behind, cut, gated

_ADD = torch.ops.aten.add.Tensor


def splice(exported: ExportedJoint, joint: SplicedGraph, kinds: Sequence[Kind]) -> ExportedJoint:
    """Replace every stand-in by a copy of its kind's template. Gates stay: they are identities.

    Raises:
        Refused: the graph might be another one than that of the whole model; `exported` is of no use any more.
    """
    templates: list[tuple[Kind, Template]] = []
    refusals: dict[str, str] = {}  # all of them, so that one more try is enough
    for kind in kinds:
        try:
            templates.append((kind, cut(joint, kind)))
        except Refused as refused:
            refusals.update(dict.fromkeys((kind.template, *kind.members), str(refused)))
    forward, backward = stand_ins(joint.graph)
    for kind, template in templates:
        for call in kind.members.values():
            try:
                if call.name not in forward:
                    raise Refused(f"{call.name}: no result of it is used", call.name)
                _Copy(joint, template, call, forward[call.name], backward.get(call.name)).run()
            except Refused as refused:
                refusals[call.name] = str(refused)
    if refusals:
        raise Refused("; ".join(dict.fromkeys(refusals.values())), *refusals)
    for _, template in templates:
        for node in template.arguments.backward:
            for user in list(node.users) if node is not None else ():
                _add_at_once(user, node, gated(node), template.backward)  # type: ignore[arg-type]
    for node in joint.graph.nodes:
        if GATE in (node.meta.get("custom") or {}):
            node.meta["custom"] = {key: value for key, value in node.meta["custom"].items() if key != GATE}
    return replace(exported, outputs=tuple(joint.roles))


def _add_at_once(user: fx.Node, item: fx.Node, term: fx.Node, backward: Sequence[fx.Node]) -> None:
    """Move the addition of a unit's gradient to where autograd does it: as soon as the node that made the term is done."""
    if user.target is _ADD and user.args[1] is item:
        same_node = [node for node in backward if node.meta.get("seq_nr") == term.meta.get("seq_nr")]
        if same_node:
            same_node[-1].append(user)


@dataclass
class _Copy:
    """One unit's copy of its template."""

    joint: SplicedGraph
    template: Template
    call: UnitCall
    forward: fx.Node
    backward: fx.Node | None

    def __post_init__(self) -> None:
        self.made: dict[fx.Node, fx.Node] = {}
        self.storages: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self.mode = self.forward.args[0][0].meta["val"].fake_mode  # type: ignore[index, union-attr]

    def run(self) -> None:
        """Replace the stand-in's nodes."""
        graph, template = self.joint.graph, self.template
        own = self.joint.weights(self.call.name)
        for name, node in template.weights.items():
            self._takes_place(node, own[name])
        arguments: Any = self.forward.args[0]
        for gate, given in zip(template.arguments.forward, arguments, strict=True):
            if gate is not None:
                self._takes_place(gate, given)
        returned = {}
        for i, item in _items(self.forward).items():
            gate = template.results.forward[i]
            if gate is None:
                raise Refused(f"{self.call.name}: its result {i} is used, the template's is not", self.call.name)
            returned[item] = gated(gate)
            self._shares_storage(gated(gate), item)
        self._copy_before(template.forward, self.forward)
        for item, node in returned.items():
            item.replace_all_uses_with(self.made[node])
            graph.erase_node(item)
        if self.backward is not None:
            self._run_backward(self.backward)
        graph.erase_node(self.forward)
        self._write_buffers(own)

    def _run_backward(self, backward: fx.Node) -> None:
        template, name = self.template, self.call.name
        incoming: Any = backward.args[0]
        if [node is None for node in template.results.backward] != [grad is None for grad in incoming]:
            raise Refused(f"{name}: gradients of other results arrive than at its template", name)
        for node, grad in zip(template.results.backward, incoming, strict=True):
            if node is not None:
                self._takes_place(node, grad)
        handed = {}
        items = _items(backward)
        for position, (i, _) in enumerate(self.call.wanted):
            node, item = template.arguments.backward[i], items.get(position)
            if item is None:
                continue
            if node is None:
                raise Refused(f"{name}: its argument {i} gets no gradient", name)
            term = gated(node)
            if any(adds_behind(user, item, term) for user in item.users):
                raise Refused(f"{name}: {OTHER_ORDER}", name)
            self._shares_storage(term, item)
            handed[item] = term
        self._copy_before(template.backward, backward)
        copies = [self.made[node] for node in template.backward]
        for item, term in handed.items():
            for user in list(item.users):
                _add_at_once(user, item, self.made[term], copies)
            item.replace_all_uses_with(self.made[term])
        self._return_gradients()
        for item in items.values():
            self.joint.graph.erase_node(item)
        self.joint.graph.erase_node(backward)

    def _return_gradients(self) -> None:
        returned = list(results(self.joint.graph))
        own = self.joint.weights(self.call.name)
        for weight, is_trained in self.call.weights:
            at = self.joint.gradient_at(own[weight])
            if returned[at] is not None:
                raise Refused(f"{self.call.name}: its parameter {weight} is used outside of it, too", self.call.name)
            gradient = returned[self.joint.gradient_at(self.template.weights[weight])]
            if is_trained and gradient is not None:
                returned[at] = self.made[gradient]
        self.joint.graph.output_node().args = (tuple(returned),)

    def _write_buffers(self, own: dict[str, fx.Node]) -> None:
        """Add what the unit writes into its buffers to the graph's results, in the order of the inputs."""
        order = {role: i for i, role in enumerate(self.joint.role_of.values())}
        for name, node in self.template.new_buffers.items():
            role = self.joint.role_of[own[name]]
            roles = self.joint.roles
            at = next(i for i, other in enumerate(roles) if other[0] != "mutation" or order[other[1:]] > order[role])
            returned = list(results(self.joint.graph))
            returned.insert(at, self.made[node])
            roles.insert(at, ("mutation", *role))
            self.joint.graph.output_node().args = (tuple(returned),)

    def _takes_place(self, node: fx.Node, here: fx.Node) -> None:
        """`here` is to the unit what `node` is to its template."""
        theirs, ours = node.meta["val"], here.meta["val"]
        if Form.of(theirs) != Form.of(ours):
            raise Refused(f"{self.call.name}: {Form.of(ours)} where its template has {Form.of(theirs)}", self.call.name)
        self.storages[storage_id(theirs)] = (ours.untyped_storage(), ours.storage_offset() - theirs.storage_offset())
        self.made[node] = here

    def _shares_storage(self, node: fx.Node, here: fx.Node) -> None:
        """The copy of `node` lies where `here` does: other nodes' views are of that storage."""
        theirs, ours = node.meta["val"], here.meta["val"]
        as_large = theirs.untyped_storage().nbytes() == ours.untyped_storage().nbytes()
        if not as_large or theirs.storage_offset() or Form.of(theirs) != Form.of(ours):
            raise Refused(
                f"{self.call.name}: a result or gradient has {Form.of(theirs)}, a part of a larger one, or otherwise than "
                f"its stand-in's {Form.of(ours)}",
                self.call.name,
            )
        self.storages[storage_id(theirs)] = (ours.untyped_storage(), 0)

    def _copy_before(self, nodes: Iterable[fx.Node], before: fx.Node) -> None:
        graph = self.joint.graph
        with graph.inserting_before(before):
            for node in nodes:
                copy = graph.node_copy(node, self.made.__getitem__)
                copy.meta = self._meta(node)
                self.made[node] = copy

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        val = node.meta.get("val")
        is_tensor = isinstance(val, torch.Tensor)
        meta: dict[str, Any] = {"val": self._fake(val) if is_tensor else pytree.tree_map(self._fake, val)}
        for key in ("seq_nr", IS_GRADIENT_SUM, observed.TRACED):
            if key in node.meta:
                meta[key] = node.meta[key]
        custom = {key: value for key, value in (node.meta.get("custom") or {}).items() if key != GATE}
        if custom:
            later = self.call.clears - self.call.kind.clears
            meta["custom"] = marks_of_copy(custom, self.template.name, self.call.name, later)
        return meta

    def _fake(self, value: Any) -> Any:
        """The unit's tensor for one of its template's: alike, in a storage of its own, the same one for all views of one."""
        if not isinstance(value, torch.Tensor):
            return value
        key = storage_id(value)
        if key not in self.storages:
            self.storages[key] = (torch.UntypedStorage(value.untyped_storage().nbytes(), device="meta"), 0)
        storage, shift = self.storages[key]
        return fake_view(self.mode, value, storage, int(value.storage_offset()) + shift)


def _items(node: fx.Node) -> dict[int, fx.Node]:
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]
