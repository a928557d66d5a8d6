"""A planned forward with the backward of another capture, in one joint graph whose forward ops are the planned ones.

A capture for other gradients traces the same forward, but drops what only the planned backward read and may keep what only the
other one reads. Values that the planned forward saved are found by their names in the planned graph, so these names are kept.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from planner._compat.fake_tensors import FakeTensor, fake_inputs
from planner.errors import BackwardError
from planner.graph.graph import Kind
from planner.tracer.joint import Input, Joint
from planner.tracer.opaque.call import draws
from planner.tracer.storage import ancestors, mutates


def graft(planned: Joint, other: Joint) -> Joint:
    """`planned`, with the backward of `other`.

    Args:
        planned: only its structure is read, not `meta`: it may come out of a file.
        other: a capture of the same model and call for other gradients.

    Raises:
        BackwardError: the other forward is not the planned one; names the first operation that differs.
    """
    counterparts = _counterparts(planned, other)
    _check_same_forward(planned, other, counterparts)
    out = fx.Graph()
    made: dict[str, fx.Node] = {}
    given_in_other = {_identity(other, given): node for given, node in _placeholders(other)}
    inputs: list[Input] = []
    seen = {name: node for node, name in counterparts.items()}
    for given, node in _placeholders(planned):
        if given.kind is not Kind.TANGENT:
            # an equal constant is its counterpart, too: views of it, and copies of a literal, share its storage
            meta = seen[node.name].meta if node.name in seen else _meta_of_input(planned, given, given_in_other, other)
            made[node.name] = _placed(out.placeholder(node.name), meta)
            inputs.append(given)
    now = {node: made[name] for node, name in counterparts.items() if name in made}
    for given, node in _placeholders(other):
        if given.kind is Kind.TANGENT:
            now[node] = _placed(out.placeholder(node.name), node.meta)
            inputs.append(replace(given, node=now[node].name))
    for node in _forward(planned):
        made[node.name] = _planned_node(out, node, made, seen.get(node.name))
        if node.name in seen:
            now[seen[node.name]] = made[node.name]
    last = list(planned.graph.nodes)[planned.num_forward_nodes - 1].name if planned.num_forward_nodes else ""
    for node in other.graph.nodes:
        if node.op == "call_function" and node not in now:
            now[node] = out.node_copy(node, now.__getitem__)
    returned: Any = other.graph.output_node().args[0]
    out.output(tuple(now[node] for node in returned))
    out.lint()
    names = {node.name: copied.name for node, copied in now.items()}
    known = {given.key: given for given in inputs if given.kind is not Kind.TANGENT}
    return replace(
        planned,
        graph=out,
        inputs=tuple(inputs),
        outputs=other.outputs,
        gradients=tuple((known[given.key], names[name]) for given, name in other.gradients),
        num_forward_nodes=next((i + 1 for i, node in enumerate(out.nodes) if node.name == last), 0),
        sources={names[name]: source for name, source in other.sources.items() if name in names} | planned.sources,
    )


def _placeholders(joint: Joint) -> Iterator[tuple[Input, fx.Node]]:
    return zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True)


def _forward(joint: Joint) -> list[fx.Node]:
    """The forward's calls, and the getitem nodes of their results that only the backward reads, which come later."""
    nodes = list(joint.graph.nodes)
    before = [node for node in nodes[: joint.num_forward_nodes] if node.op == "call_function"]
    known = set(before)
    return before + [node for node in nodes[joint.num_forward_nodes :] if _is_item_of(node, known)]


def _is_item_of(node: fx.Node, kernels: set[fx.Node]) -> bool:
    return node.target is operator.getitem and node.args[0] in kernels


def _identity(joint: Joint, given: Input) -> Any:
    """What an input is, in any capture of the model."""
    return id(joint.constants[given.node]) if given.node in joint.constants else (given.kind, given.key)


def _counterparts(planned: Joint, other: Joint) -> dict[fx.Node, str]:
    """Inputs and forward nodes of `other` -> names of the planned nodes that are the same call on the same tensors."""
    by_identity = {_identity(planned, given): node.name for given, node in _placeholders(planned)}
    counterparts: dict[fx.Node, str] = {}
    for given, node in _placeholders(other):
        name = by_identity.get(_identity(other, given)) or _equal_constant(planned, other, given, counterparts.values())
        if given.kind is not Kind.TANGENT and name is not None:
            counterparts[node] = name
    calls: dict[str, deque[str]] = {}
    for node in _forward(planned):
        calls.setdefault(_call(node, {arg: arg.name for arg in node.all_input_nodes}), deque()).append(node.name)
    for node in _forward(other):
        if all(arg in counterparts for arg in node.all_input_nodes):
            same = calls.get(_call(node, counterparts))
            if same:
                counterparts[node] = same.popleft()
    return counterparts


def _equal_constant(planned: Joint, other: Joint, given: Input, taken: Collection[str]) -> str | None:
    """A constant that each trace makes anew, or of a plan that was loaded, is another tensor of the same content.

    Of several, each counts once: both traces meet them in the same order.
    """
    constant = other.constants.get(given.node)
    if constant is None:
        return None
    is_equal = lambda held: held.dtype is constant.dtype and held.shape == constant.shape and torch.equal(held, constant)
    equal = [name for name, held in planned.constants.items() if is_equal(held)]
    return next((name for name in equal if name not in taken), equal[0] if equal else None)


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: f"%{names[arg]}")
    return f"{node.target} {args} {sorted(kwargs.items())}"


def _check_same_forward(planned: Joint, other: Joint, counterparts: dict[fx.Node, str]) -> None:
    """Results, writes and random draws are those of the plan, and so is all that they depend on."""
    nodes = {node.name: node for node in other.graph.nodes}
    found = tuple(counterparts.get(nodes[name]) for name in other.results)
    acts = [node for node in _forward(other) if draws(node, other.opaque_calls) or mutates(node)]
    needed = ancestors([nodes[name] for name in other.results])
    wrong = [node for node in _forward(other) if node not in counterparts and (node in acts or node in needed)]
    if not wrong and found == planned.results:
        matched = {counterparts[node] for node in acts}
        absent = [node.name for node in _forward(planned) if mutates(node) and node.name not in matched]
        if not absent:
            return
        what = f"no longer writes ({absent[0]})"
    elif wrong:
        where = other.sources.get(wrong[0].name)
        what = f"has {wrong[0].target}{f' at {where}' if where else ''} where the plan has something else"
    else:
        what = "returns other tensors"
    raise BackwardError(
        f"the model's forward, traced again for this backward, {what}: the model was changed between the planned forward and "
        "its backward. Change it before the forward, or plan again"
    )


def _placed(node: fx.Node, meta: dict[str, Any]) -> fx.Node:
    node.meta = dict(meta)
    return node


def _meta_of_input(planned: Joint, given: Input, in_other: dict[Any, fx.Node], other: Joint) -> dict[str, Any]:
    counterpart = in_other.get(_identity(planned, given))
    if counterpart is None:  # a constant that only the planned graph reads, or one out of a file
        mode = next(node.meta["val"] for node in in_other.values()).fake_mode
        return {"val": mode.from_tensor(planned.constants[given.node], static_shapes=True)}
    return counterpart.meta


def _planned_node(out: fx.Graph, node: fx.Node, made: dict[str, fx.Node], counterpart: fx.Node | None) -> fx.Node:
    """A copy of a node of the planned forward, with the metadata of its counterpart; without one, of a run on fake tensors."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: made[arg.name])
    copy = out.create_node("call_function", node.target, args, kwargs, name=node.name)
    if counterpart is not None:
        return _placed(copy, counterpart.meta)
    vals = fx.node.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    mode = next((v.meta["val"].fake_mode for v in copy.all_input_nodes if isinstance(v.meta["val"], FakeTensor)), None)
    if mode is None:
        mode = next(iter(fake_inputs([torch.empty(0)]))).fake_mode  # type: ignore[attr-defined]
    with mode:
        val = node.target(*vals[0], **vals[1])  # type: ignore[operator]
    return _placed(copy, {"val": val})
