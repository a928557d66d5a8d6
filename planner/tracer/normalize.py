"""The exported graph -> Joint: the normal form that lowering and rewriting rely on (tracer/joint.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import HigherOrderOperator
from planner._compat.fx_graphs import results
from planner._compat.joint_export import ExportedJoint
from planner.errors import CaptureError
from planner.graph.graph import Kind
from planner.graph.source import NOWHERE, Source
from planner.kernels import custom
from planner.kernels.facts import is_random
from planner.kernels.observed import is_foreign
from planner.tracer.call import CallSpec
from planner.tracer.casts import merge_casts
from planner.tracer.fidelity import SOURCE, Read
from planner.tracer.joint import HostRead, Input, Joint, Output
from planner.tracer.mutation import hidden_mutations, write_mutations
from planner.tracer.part import PartCall
from planner.tracer.parts import is_traced_part, write_parts
from planner.tracer.raising import in_forward, raises, write_raising
from planner.tracer.randomness import draw_as_eager, save_rng_states
from planner.tracer.replay import set_layouts
from planner.tracer.storage import Storages, ancestors, mutates

aten = torch.ops.aten
_KINDS = {"param": Kind.PARAM, "buffer": Kind.BUFFER, "input": Kind.INPUT, "tangent": Kind.TANGENT}
_BATCH_NORM_BACKWARD = {aten.native_batch_norm_backward.default: 7}
"""Batch norm backward -> position of `train`; arguments 3 and 4 are the running statistics."""

Role = tuple[Any, ...]


def normalize(
    exported: ExportedJoint,
    *,
    names: dict[str, str],
    outputs: Sequence[Output],
    num_results: int,
    reads: Sequence[Read],
    call: CallSpec,
    device: torch.device,
    parts: Mapping[str, PartCall],
    moving: Collection[int] = (),
) -> Joint:
    """Bring the exported joint graph into normal form.

    Args:
        exported: as traced; its graph is taken over and changed.
        names: the model's parameter and buffer names by the names in `exported`.
        outputs: one per output leaf of the model.
        num_results: how many results of the traced function stand for outputs; tensors that Python read follow.
        reads: what it read of each of those.
        call, device: handed on.
        parts: recorded calls of opaque parts, by key.
        moving: positions of the inputs whose place holds another tensor after the forward.

    Raises:
        CaptureError: the graph holds something that cannot be planned exactly (named).
    """
    graph = exported.graph_module.graph
    node_of = dict(zip(exported.inputs, graph.find_nodes(op="placeholder"), strict=True))
    inputs = {n.name: Input(n.name, _KINDS[role[0]], names.get(role[1], role[1])) for role, n in node_of.items()}
    constants = _lift_constants(graph, exported.graph_module, inputs)
    guards, host_reads, roles = _split_off_reads(graph, exported.outputs, num_results, reads)
    _refuse(graph, roles, inputs, node_of)
    changed = [role[1:] for role in roles if role[0] == "mutation"] + [("input", i) for i in moving]
    _refuse_moving_reads(guards, host_reads, [node_of[role].name for role in changed])
    checks = in_forward(graph)
    tickets = _write_kernels(graph, roles, node_of, parts, device)
    last_forward = _write_mutations(graph, roles, node_of, inputs, _end_forward(graph, roles, node_of, checks))
    gradients = _return_gradients(graph, roles, node_of, last_forward)
    rng_states = save_rng_states(graph, last_forward, device)
    graph.lint()
    final = results(graph)
    nodes = list(graph.nodes)
    return Joint(
        graph=graph,
        inputs=tuple(inputs[node.name] for node in graph.find_nodes(op="placeholder")),
        outputs=tuple(outputs),
        results=tuple(node.name for node in final[:num_results]),
        gradients=tuple((inputs[node.name], final[i].name) for node, i in gradients),
        rng_states=rng_states,
        num_forward_nodes=nodes.index(last_forward) + 1 if last_forward is not None else 0,
        constants=constants,
        guards=guards,
        host_reads=host_reads,
        call=call,
        sources={node.name: _source(node) for node in nodes},
        device=device,
        parts=parts,
        tickets=tickets,
    )


def _write_kernels(
    graph: fx.Graph, roles: Sequence[Role], node_of: dict[Role, fx.Node], parts: Mapping[str, PartCall], device: torch.device
) -> frozenset[str]:
    """Turn what was traced into the kernels that eager runs; nodes that hold opaque parts' tickets."""
    write_raising(graph)
    _drop_detach(graph)
    set_layouts(graph)
    tickets = write_parts(graph, parts)
    merge_casts(graph, {node_of[role[1:]]: i for i, role in enumerate(roles) if role[0] == "gradient"})
    draw_as_eager(graph, device)
    _drop_copies(graph)
    _read_no_new_statistics(graph)
    graph.eliminate_dead_code(is_impure_node=_has_effects)
    return tickets


def _has_effects(node: fx.Node) -> bool:
    """What eager runs for more than its result; who knows what an operator from outside of torch does besides."""
    if node.op in ("placeholder", "output") or node.target is custom.part or is_random(node) or raises(node):
        return True
    return node.op == "call_function" and is_foreign(node.target)


def _write_mutations(
    graph: fx.Graph, roles: Sequence[Role], node_of: dict[Role, fx.Node], inputs: dict[str, Input], last_forward: fx.Node | None
) -> fx.Node | None:
    """Make every write a node, note it on the input it changes, and return the forward's last node."""
    mutations = [(node_of[role[1:]], n) for role, n in zip(roles, results(graph), strict=True) if role[0] == "mutation"]
    last_forward = write_mutations(graph, mutations, last_forward)
    for node in (*(placeholder for placeholder, _ in mutations), *hidden_mutations(graph)):
        inputs[node.name] = replace(inputs[node.name], mutated=True)
    return last_forward


def _split_off_reads(
    graph: fx.Graph, roles: Sequence[Role], num_results: int, reads: Sequence[Read]
) -> tuple[fx.Graph | None, tuple[HostRead, ...], list[Role]]:
    """A graph of the tensors that Python read, what it read, and the roles of the results that stay.

    What is computed from shapes alone is the same in every call that the plan is for, and is left out.
    """
    handed = list(zip(roles, results(graph), strict=True))
    read = [node for role, node in handed if role[0] == "output" and role[1] >= num_results]
    varying = [(node, seen) for node, seen in zip(read, reads, strict=True) if not _is_constant(node)]
    guards = _guards(graph, varying)
    names = [node.name for node in results(guards)] if guards is not None else []
    host_reads = tuple(HostRead(name, seen.value, seen.source) for name, (_, seen) in zip(names, varying, strict=True))
    stay = [(role, node) for role, node in handed if node is not None and not (role[0] == "output" and role[1] >= num_results)]
    graph.output_node().args = (tuple(node for _, node in stay),)
    return guards, host_reads, [role for role, _ in stay]


def _refuse_moving_reads(guards: fx.Graph | None, host_reads: Sequence[HostRead], mutated: Collection[str]) -> None:
    """Raise CaptureError where Python reads what the forward itself changes: the next call would read something else."""
    for node, read in zip(results(guards) if guards is not None else (), host_reads, strict=True):
        if any(needed.name in mutated for needed in ancestors([node])):
            raise CaptureError(
                f"the model's control flow at {read.source} reads a tensor that its own forward changes ({read.value} now); "
                "a plan holds for one value of it",
                module=read.source.module,
            )


def _is_constant(node: fx.Node) -> bool:
    """Nothing that can change between calls goes into it."""
    return all(n.op == "call_function" and not is_random(n) for n in ancestors([node]))


def _source(node: fx.Node) -> Source:
    found: Source = (node.meta.get("custom") or {}).get(SOURCE, NOWHERE)
    return found


def _refuse(graph: fx.Graph, roles: Sequence[Role], inputs: dict[str, Input], node_of: dict[Role, fx.Node]) -> None:
    """Raise CaptureError for what no schedule could run exactly."""
    for role in roles:
        if role[0] == "mutation" and role[1] == "param" and ("gradient", *role[1:]) in roles:
            raise CaptureError(f"the forward writes into the parameter {inputs[node_of[role[1:]].name].key}; make it a buffer")
        if role[0] == "mutation" and role[1] == "tangent":
            raise CaptureError("the backward writes into an incoming gradient")
    for node in graph.nodes:
        if node.op == "call_function" and mutates(node):
            raise CaptureError(
                f"{node.target} at {_source(node)} writes into a tensor in a way functionalization left in",
                module=_source(node).module,
            )
        for tensor in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
                raise CaptureError(
                    f"{node.target} at {_source(node)} makes a {str(tensor.layout).removeprefix('torch.')} tensor; "
                    "only dense tensors can be planned (nn.Embedding: sparse=False)",
                    module=_source(node).module,
                )
        if isinstance(node.target, HigherOrderOperator) or node.op in ("call_module", "call_method"):
            raise CaptureError(
                f"{node.target} at {_source(node)} is a control-flow or higher-order operator; it cannot be planned",
                module=_source(node).module,
            )


def _end_forward(
    graph: fx.Graph, roles: Sequence[Role], node_of: dict[Role, fx.Node], checks: Sequence[fx.Node]
) -> fx.Node | None:
    """Bring the forward together in front, `checks` included, and return its last node."""
    forward_results = [node for role, node in zip(roles, results(graph), strict=True) if role[0] != "gradient"] + [*checks]
    _move_forward_up(graph, forward_results, [node for role, node in node_of.items() if role[0] == "tangent"])
    return _last_ancestor(graph, forward_results)


def _return_gradients(
    graph: fx.Graph, roles: Sequence[Role], node_of: dict[Role, fx.Node], last_forward: fx.Node | None
) -> list[tuple[fx.Node, int]]:
    """Drop the mutations, now nodes, from the results; (input, position among the results) of every gradient."""
    kept = [(role, node) for role, node in zip(roles, results(graph), strict=True) if role[0] != "mutation"]
    graph.output_node().args = (tuple(node for _, node in kept),)
    gradients = [(node_of[role[1:]], i) for i, (role, _) in enumerate(kept) if role[0] == "gradient"]
    _own_gradients(graph, gradients, last_forward)
    return gradients


def _move_forward_up(graph: fx.Graph, forward_results: Iterable[fx.Node], tangents: Iterable[fx.Node]) -> None:
    """Put what the forward's results need before the first node that a tangent reaches.

    Functionalization makes a view of what was written in place anew when somebody asks for it: after the backward.
    """
    needed, reached = ancestors(forward_results), set(tangents)
    first: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op == "call_function" and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            first = first or node
        elif first is not None and node in needed:
            first.prepend(node)


def _last_ancestor(graph: fx.Graph, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The last call in graph order that `nodes` depend on: the end of the forward."""
    needed = ancestors(nodes)
    return next((n for n in reversed(graph.nodes) if n in needed and n.op == "call_function"), None)


def _guards(graph: fx.Graph, reads: Sequence[tuple[fx.Node, Read]]) -> fx.Graph | None:
    """The part of the graph that computes the tensors Python read, from the call's inputs alone."""
    if not reads:
        return None
    for node, read in reads:
        moving = [n for n in ancestors([node]) if n.op == "call_function" and (is_random(n) or is_traced_part(n))]
        if moving:
            why = "random numbers" if is_random(moving[0]) else "a part of it that runs as it is"
            cure = "set validate_args=False in torch.distributions there: " if read.is_validation else ""
            raise CaptureError(
                f"{cure}the model's control flow at {read.source} depends on {why} "
                f"({moving[0].target} at {_source(moving[0])})",
                module=read.source.module,
            )
    needed = ancestors(node for node, _ in reads)
    guards = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        copies[node] = guards.node_copy(node, copies.__getitem__)
    guards.output(tuple(copies[node] for node, _ in reads))
    return guards


def _lift_constants(graph: fx.Graph, owner: fx.GraphModule, inputs: dict[str, Input]) -> dict[str, torch.Tensor]:
    """Turn tensors held in get_attr nodes into inputs, so that a planned module's state_dict does not grow."""
    constants: dict[str, torch.Tensor] = {}
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        tensor = getattr(owner, node.target, None)
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(
                f"the graph holds {node.target}, a {type(tensor).__name__}: higher-order operators cannot be planned"
            )
        with graph.inserting_before(first):
            placeholder = graph.placeholder(f"constant_{len(constants)}")
        placeholder.meta["val"] = node.meta.get("val", tensor)
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        inputs[placeholder.name] = Input(placeholder.name, Kind.BUFFER, f"constant:{len(constants)}")
        constants[placeholder.name] = tensor
    return constants


def _drop_detach(graph: fx.Graph) -> None:
    """No graph of ours runs under autograd, where detach would mean something."""
    for target in (aten.detach.default, aten.alias.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_copies(graph: fx.Graph) -> None:
    """Read the original in place of its copy, as nothing writes into either.

    Autograd copies what an in-place kernel overwrites and the backward reads (`silu_`, `clamp_`, ...). The graph has no such
    writes, so that the original is still there; only what the caller is handed must not be what the backward reads.
    """
    storages = Storages(graph)
    made = {name: nbytes for names in storages.writes.values() for name, nbytes in names}
    written = [arg for node in graph.nodes if mutates(node) for arg in node.all_input_nodes]
    apart = {storages.root[node] for node in (*results(graph), *written) if node in storages.root}
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        original = copy.args[0]
        name, val, like = storages.root[original], original.meta["val"], copy.meta["val"]
        same = val.stride() == like.stride() and made.get(name) == made[copy.name]  # a copy of a part lets the rest go
        if same and apart.isdisjoint((name, copy.name)):
            copy.replace_all_uses_with(original)
            graph.erase_node(copy)


def _read_no_new_statistics(graph: fx.Graph) -> None:
    """Undo a read that functionalization added and nobody needs.

    In training mode batch norm's backward reads no running statistics, though it is handed the updated
    ones; handing it the buffers instead leaves them free and the forward kernel recomputable.
    """
    for target, train in _BATCH_NORM_BACKWARD.items():
        for node in graph.find_nodes(op="call_function", target=target):
            forward = [_batch_norm_of(arg) for arg in node.args[3:5]]
            if node.args[train] is True and all(forward):
                running = [norm.args[3:5][i] for i, norm in enumerate(forward) if norm is not None]
                node.args = (*node.args[:3], *running, *node.args[5:])


def _batch_norm_of(item: Any) -> fx.Node | None:
    """The training-mode batch norm whose new running mean or variance `item` is."""
    kernel = item.args[0] if isinstance(item, fx.Node) and item.args else None
    if isinstance(kernel, fx.Node) and kernel.target is aten._native_batch_norm_legit_functional.default:
        return kernel if kernel.args[5] is True else None
    return None


def _own_gradients(graph: fx.Graph, gradients: Sequence[tuple[fx.Node, int]], last_forward: fx.Node | None) -> None:
    """Give every gradient a storage of its own, laid out as its input: then the engine takes it over as it is.

    The engine would otherwise copy it itself, at a moment and at bytes no plan knows of.
    """
    storages = Storages(graph)
    handed = list(results(graph))
    made = {name for names in storages.writes.values() for name, _ in names}
    taken = {storages.root[node] for i, node in enumerate(handed) if i not in {i for _, i in gradients}}
    for placeholder, i in gradients:
        node, like = handed[i], placeholder.meta["val"]
        val = node.meta["val"]
        root = storages.root[node]
        if root in made and root not in taken and val.stride() == like.stride() and val.dtype == like.dtype:
            taken.add(root)
            continue
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(custom.laid_out, (node, tuple(like.shape), tuple(like.stride())))
        _move_up(graph, copy, node, last_forward)
        copy.meta["val"] = torch.empty_strided(like.shape, like.stride(), dtype=val.dtype, device="meta")
        handed[i] = copy
    graph.output_node().args = (tuple(handed),)


def _move_up(graph: fx.Graph, node: fx.Node, after: fx.Node, last_forward: fx.Node | None) -> None:
    """Run `node` as soon as its argument is there: where that is handed in, as the first of the backward."""
    place = after if after.op != "placeholder" else last_forward or list(graph.find_nodes(op="placeholder"))[-1]
    place.append(node)
