"""A planned step's graphs turned into code for one model: an `Executable`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem, itemgetter
from typing import Any

import torch
from torch import fx, nn

from planner._compat.backward_state import keeps_graph
from planner._compat.fx_graphs import box
from planner.graph.graph import Kind
from planner.kernels import custom
from planner.kernels.batch_norm import source_of_statistic
from planner.rewriter.compiled import CompiledGraph
from planner.rewriter.stages import cut_stages
from planner.rewriter.sums import separated
from planner.runtime.executable import Boxed, Executable
from planner.runtime.step import RewrittenStep
from planner.tracer.casts import is_cast
from planner.tracer.joint import Input
from planner.tracer.opaque.call import OpaqueCall
from planner.tracer.opaque.module import OpaqueModule


def make_executable(step: RewrittenStep, model: nn.Module, forward: fx.Graph, backward: fx.Graph) -> Executable:
    """Code of the graphs, bound to this model's opaque modules.

    Args:
        forward, backward: `step.partitioned`'s graphs, which users may have edited.
    """
    joint, partitioned = step.joint, step.partitioned
    opaque = _opaque_calls(step, model)
    compiled_for = joint.device if step.is_compiled else None
    inputs = [given for given in joint.inputs if given.kind is not Kind.TANGENT]
    position = {given.node: i for i, given in enumerate(inputs)}
    terms = separated(backward, partitioned.separable, partitioned.stage_ends)
    returned = [given for given, _ in (*joint.gradients, *(joint.gradients[i] for i in terms.gradient_of))]
    input_of_gradient = [position[given.node] for given in returned]
    owner_names = [given.node.replace(".", "_") for given in returned]
    stages = cut_stages(terms.graph, step.num_stages, owner_names, terms.ends)
    nodes = {node.name: node for node in joint.graph.nodes}
    output_of_result = {out.result: out for out in reversed((*joint.outputs, *joint.left)) if out.result is not None}
    found = [output_of_result[i] for i in range(len(joint.results))]
    differentiable = tuple(out.requires_grad and not out.is_leaf for out in found)
    return Executable(
        forward=boxed(forward, opaque, compiled_for),
        stages=tuple(boxed(stage.graph, opaque, compiled_for) for stage in stages),
        num_outputs=len(joint.results),
        num_saved=len(partitioned.saved),
        differentiable=differentiable,
        output_gradients=partitioned.output_gradients,
        owners=tuple(tuple(input_of_gradient[i] for i in stage.gradients) for stage in stages),
        names=tuple(output_of_result[i].name for i in range(len(joint.results))),
        swaps=tuple(any(node.target is custom.swap_rng_state for node in stage.graph.nodes) for stage in stages),
        device=joint.device,
        stage_gradients=tuple(stage.gradients for stage in stages),
        num_gradients=len(joint.gradients),
        inputs=tuple(f"input {given.key}" if given.kind is Kind.INPUT else str(given.key) for given in inputs),
        key=step.backward_key,
        spare=tuple(position[name] for name in partitioned.spare),
        cast=tuple(
            position[given.node]
            for given, _ in joint.gradients
            if given.kind is Kind.PARAM and is_cast(nodes[given.node], joint.opaque_calls)
        ),
        summed=frozenset(
            position[given.node]
            for given, name in joint.gradients
            if _is_sum(joint.uses.get(given.node, 0), nodes[name], joint.opaque_calls)
        ),
        separated=frozenset(input_of_gradient[i] for i in range(len(joint.gradients), len(returned))),
        unversioned=tuple(position[node.args[0].name] for node in nodes.values() if _writes_statistic(node)),
        inner=tuple(i for i, can in enumerate(differentiable) if can and output_of_result[i].is_inner),
        recomputes=any(node.name.endswith("_recomputed") for node in backward.nodes),
        views=tuple(i for i, name in enumerate(joint.results) if getattr(nodes[name].target, "is_view", False)),
        sharing=_sharing(partitioned.roots, differentiable),
        **_saved_fields(step, inputs, position),
    )


def _sharing(roots: Sequence[str], differentiable: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
    """Positions of the differentiable results in each storage that holds several; `roots`: per result, its storage."""
    found: dict[str, list[int]] = {}
    for i, (root, can) in enumerate(zip(roots, differentiable, strict=True)):
        if can:
            found.setdefault(root, []).append(i)
    return tuple(tuple(positions) for positions in found.values() if len(positions) > 1)


def _writes_statistic(node: fx.Node) -> bool:
    """A write of a running statistic into its buffer: batch norm's own kernel does not count it as a new version."""
    is_write = node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"  # type: ignore[union-attr]
    return is_write and source_of_statistic(node.args[1]) is not None


def _is_sum(uses: int, gradient: fx.Node, calls: Mapping[str, OpaqueCall]) -> bool:
    """A gradient adds up terms of several uses. `calls`: of opaque modules, by key, inside of which there may be several."""
    base = gradient
    while base.target in (custom.laid_out, torch.ops.aten.clone.default):
        base = base.all_input_nodes[0]
    if base.target is getitem and base.all_input_nodes[0].target is custom.opaque_backward:
        call = calls[str(base.all_input_nodes[0].args[0])]
        return abs(uses) > 1 or call.differentiated[base.args[1]] in call.several_uses  # type: ignore[index]
    return abs(uses) > 1


def _saved_fields(step: RewrittenStep, inputs: Sequence[Input], position: Mapping[str, int]) -> dict[str, Any]:
    """The fields of an Executable that say what is saved for the backward, and which results share storage with it.

    Args:
        inputs: of the forward graph.
        position: by node name, the position in `inputs`.
    """
    joint, partitioned = step.joint, step.partitioned
    roots, saved, exposed = partitioned.roots, partitioned.saved, partitioned.exposed
    checked = [name for name in partitioned.saved_inputs if not inputs[position[name]].mutated]
    unchecked = [name for name in partitioned.saved_inputs if inputs[position[name]].mutated]
    return {
        "aliased": partitioned.aliased,
        "alone": tuple(
            not aliased and roots.count(root) == 1 for root, aliased in zip(roots, partitioned.aliased, strict=True)
        ),
        "checked_inputs": tuple(position[name] for name in checked),
        "unchecked_inputs": tuple(position[name] for name in unchecked),
        "saved_inputs": tuple(
            (name in checked, (checked if name in checked else unchecked).index(name)) for name in partitioned.saved_inputs
        ),
        "call_inputs": tuple(position[name] for name in checked if inputs[position[name]].kind is Kind.INPUT),
        "kept_on_ctx": tuple(i for i, name in enumerate(saved) if name in joint.saved_handles or name in exposed),
        "exposed": frozenset(i for i, name in enumerate(saved) if name in exposed),
        "version_checked": tuple(
            (i, saved.index(root) if root in exposed else None)
            for i, root in enumerate(roots)
            if root in saved or root in checked
        ),
    }


def backward_compiler(step: RewrittenStep, model: nn.Module) -> Callable[[fx.Graph], Boxed]:
    """A function that turns another backward graph of this step into code."""
    return lambda backward: boxed(backward, _opaque_calls(step, model), step.joint.device if step.is_compiled else None)


def boxed(graph: fx.Graph, opaque: Mapping[str, OpaqueModule] | None = None, compiled_for: torch.device | None = None) -> Boxed:
    """A graph's code.

    Args:
        opaque: calls of opaque modules, by their key in the graph; the code runs this model's modules.
        compiled_for: the device, where inductor is to compile the code.
    """
    copy = fx.Graph()  # the graph that people print keeps its readable signature
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.target in (custom.opaque_forward, custom.opaque_backward):
            key, *given = node.args
            node.target, node.args = _bound((opaque or {})[str(key)], node.target is custom.opaque_forward), tuple(given)
    if compiled_for is not None:
        with torch.autocast(compiled_for.type, enabled=False):
            return CompiledGraph(copy)
    box(copy)
    return fx.GraphModule({}, copy).forward  # type: ignore[no-any-return]


def _bound(module: OpaqueModule, is_forward: bool) -> Callable[..., Any]:
    """The forward or backward of one opaque module's call, as a function that fx's code can call by name."""

    def opaque_forward(tensors: Any) -> Any:
        return module.forward(tensors)

    def opaque_backward(grads: Any, saved_handle: Any, read: Any, arrived: Any) -> Any:
        return module.backward(grads, saved_handle, read, arrived, keeps_graph())

    return opaque_forward if is_forward else opaque_backward


def _opaque_calls(step: RewrittenStep, model: nn.Module) -> dict[str, OpaqueModule]:
    return {key: OpaqueModule(model.get_submodule(spec.module), spec) for key, spec in step.joint.opaque_calls.items()}


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that selects these positions of a sequence; itemgetter is several times faster than a loop."""
    return itemgetter(*positions) if len(positions) > 1 else lambda given: [given[i] for i in positions]


def positions(step: RewrittenStep) -> list[int]:
    """Per input of the forward graph, its position in (model's tensors, call's tensors, tensors of Python state, constants)."""
    names = {name: i for i, (name, _) in enumerate(step.key.weights)}
    constants = {node: i for i, node in enumerate(step.joint.constants)}
    num_tensors = len(step.joint.call.tensors) + len(step.joint.host.state)
    sources = []
    for given in step.joint.inputs:
        if given.kind is Kind.TANGENT:
            continue
        if given.node in constants:
            sources.append(len(names) + num_tensors + constants[given.node])
        elif given.kind is Kind.INPUT:
            sources.append(len(names) + int(given.key))
        else:
            sources.append(names[str(given.key)])
    return sources
