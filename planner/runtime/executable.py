"""The code of a planned step: graphs compiled for one model, and where their inputs lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import fx, nn

from planner._compat.internals import box, keeps_graph
from planner.graph.graph import Kind
from planner.kernels import custom
from planner.rewriter.compiled import Compiled
from planner.rewriter.stages import cut_stages
from planner.runtime.autograd import Boxed, Program
from planner.runtime.step import Step
from planner.tracer.casts import is_cast
from planner.tracer.part import Part


def boxed(graph: fx.Graph, parts: Mapping[str, Part] | None = None, compiled_for: torch.device | None = None) -> Boxed:
    """A graph's code, which takes one list and empties it; opaque modules are bound to this model's."""
    twin = fx.Graph()  # a copy: the one people print keeps its readable signature
    twin.output(twin.graph_copy(graph, {}))
    for node in twin.nodes:
        if node.target in (custom.part, custom.part_backward):
            key, *given = node.args
            node.target, node.args = _bound((parts or {})[str(key)], node.target is custom.part), tuple(given)
    if compiled_for is not None:
        with torch.autocast(compiled_for.type, enabled=False):
            return Compiled(twin)
    box(twin)
    return fx.GraphModule({}, twin).forward  # type: ignore[no-any-return]


def _bound(called: Part, is_forward: bool) -> Callable[..., Any]:
    """A kernel of this one part, as fx's code can call it."""

    def part_forward(tensors: Any) -> Any:
        return called.forward(tensors)

    def part_backward(grads: Any, ticket: Any, read: Any, arrived: Any) -> Any:
        return called.backward(grads, ticket, read, arrived, keeps_graph())

    return part_forward if is_forward else part_backward


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Picks these out of a sequence; itemgetter is several times faster than a loop, but takes no tuple of one."""
    return itemgetter(*positions) if len(positions) > 1 else lambda given: [given[i] for i in positions]


def positions(step: Step) -> list[int]:
    """Per graph input, its position among the model's tensors, the call's, and the constants, one after the other."""
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


def compiled_backward(step: Step, model: nn.Module) -> Callable[[fx.Graph], Boxed]:
    """Makes code of a backward graph of this step."""
    return lambda backward: boxed(backward, _parts(step, model), step.joint.device if step.is_compiled else None)


def compiled_program(step: Step, model: nn.Module, forward: fx.Graph, backward: fx.Graph) -> Program:
    """Positions and code for the runtime."""
    parts = _parts(step, model)
    joint, halves = step.joint, step.halves
    compiled_for = joint.device if step.is_compiled else None
    inputs = [given for given in joint.inputs if given.kind is not Kind.TANGENT]
    position = {given.node: i for i, given in enumerate(inputs)}
    owners = [given.node.replace(".", "_") for given, _ in joint.gradients]
    stages = cut_stages(backward, step.num_stages, owners)
    checked = [name for name in halves.saved_inputs if not inputs[position[name]].mutated]
    unchecked = [name for name in halves.saved_inputs if inputs[position[name]].mutated]
    owned = [position[given.node] for given, _ in joint.gradients]
    nodes = {node.name: node for node in joint.graph.nodes}
    leaf = {out.result: out for out in reversed((*joint.outputs, *joint.left)) if out.result is not None}
    return Program(
        forward=boxed(forward, parts, compiled_for),
        stages=tuple(boxed(stage.graph, parts, compiled_for) for stage in stages),
        num_outputs=len(joint.results),
        num_saved=len(halves.saved),
        aliased=halves.aliased,
        alone=tuple(
            not aliased and halves.roots.count(root) == 1 for root, aliased in zip(halves.roots, halves.aliased, strict=True)
        ),
        differentiable=tuple(leaf[i].requires_grad for i in range(len(joint.results))),
        tangents=halves.tangents,
        checked_inputs=tuple(position[name] for name in checked),
        unchecked_inputs=tuple(position[name] for name in unchecked),
        saved_inputs=tuple(
            (name in checked, (checked if name in checked else unchecked).index(name)) for name in halves.saved_inputs
        ),
        owners=tuple(tuple(owned[i] for i in stage.gradients) for stage in stages),
        describe=tuple(leaf[i].name for i in range(len(joint.results))),
        swaps=tuple(any(node.target is custom.swap_rng_state for node in stage.graph.nodes) for stage in stages),
        device=joint.device,
        stage_gradients=tuple(stage.gradients for stage in stages),
        inputs=tuple(f"input {given.key}" if given.kind is Kind.INPUT else str(given.key) for given in inputs),
        call_inputs=tuple(position[name] for name in checked if inputs[position[name]].kind is Kind.INPUT),
        key=step.backward_key,
        apart=tuple(i for i, name in enumerate(halves.saved) if name in joint.tickets or name in halves.exposed),
        exposed=frozenset(i for i, name in enumerate(halves.saved) if name in halves.exposed),
        watched=tuple(
            (i, halves.saved.index(root) if root in halves.exposed else None)
            for i, root in enumerate(halves.roots)
            if root in halves.saved or root in checked
        ),
        spare=tuple(position[name] for name in halves.spare),
        cast=tuple(
            position[given.node] for given, _ in joint.gradients if given.kind is Kind.PARAM and is_cast(nodes[given.node])
        ),
        views=tuple(i for i, name in enumerate(joint.results) if getattr(nodes[name].target, "is_view", False)),
    )


def _parts(step: Step, model: nn.Module) -> dict[str, Part]:
    return {key: Part(model.get_submodule(spec.module), spec) for key, spec in step.joint.parts.items()}
