"""The backward graph cut into stages, so that gradients leave it as soon as they are complete."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from planner._compat.dispatch import OpOverload
from planner._compat.fx_graphs import results

aten = torch.ops.aten
_UNDECLARED_VIEWS = frozenset({aten._unsafe_view.default, aten.reshape.default, aten.contiguous.default})
"""Kernels that may return a view of their argument although their schema does not say so."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the backward.

    Attributes:
        graph: placeholders are what is alive where the stage begins; results are the gradients in
            `gradients`, then what is alive where it ends (the next stage's placeholders).
        gradients: positions, in the backward graph's results, of the gradients complete in this stage.
    """

    graph: fx.Graph
    gradients: tuple[int, ...]


def cut_stages(backward: fx.Graph, num_stages: int, owners: Sequence[str] = (), ends: Sequence[int] = ()) -> tuple[Stage, ...]:
    """Cut after gradients, about as many in every stage; order and count of the nodes stay as they are.

    A gradient is returned after the last read of its parameter: an optimizer may step inside the backward. Where there are
    several of one parameter, autograd adds them up in the order in which they are returned, which is the one given.

    Args:
        backward: with one output node of a tuple of gradients.
        num_stages: at most this many.
        owners: per gradient, the name of its parameter's placeholder; the backward need not have one.
        ends: where to cut instead: numbers of leading nodes, one per stage.
    """
    gradients: Sequence[fx.Node] = results(backward)
    order = {node: i for i, node in enumerate(backward.nodes)}
    completed = sorted({order[node] for node in gradients})
    num_stages = max(1, min(num_stages, len(completed)))
    cuts = [completed[(k + 1) * len(completed) // num_stages - 1] for k in range(num_stages - 1)]
    if ends:
        cuts = [end - 1 for end in ends[:-1]]
    stage_of = {node: sum(position > cut for cut in cuts) for node, position in order.items()}
    for node in backward.find_nodes(op="call_function", target=operator.getitem):
        stage_of[node] = stage_of[node.args[0]]  # with its kernel: no tuple is passed between stages

    # autograd never visits a stage that returns nothing
    kept = sorted({*_stages_of_gradients(backward, stage_of, owners)}) or [0]
    stage_of = {node: min(bisect_left(kept, stage), len(kept) - 1) for node, stage in stage_of.items()}
    num_stages = len(kept)
    last_use, returned_in = _last_use(stage_of), _stages_of_gradients(backward, stage_of, owners)
    for node, stage in zip(gradients, returned_in, strict=True):
        last_use[node] = max(last_use.get(node, 0), stage)
    alive = list(backward.find_nodes(op="placeholder"))
    stages = []
    for k in range(num_stages):
        graph = fx.Graph()
        now: dict[fx.Node, fx.Node] = {}
        for node in alive:
            now[node] = graph.placeholder(node.name)
            now[node].meta = dict(node.meta)
        body = [node for node, stage in stage_of.items() if stage == k and node.op == "call_function"]
        for node in body:
            now[node] = graph.node_copy(node, now.__getitem__)
        mine = tuple(i for i, stage in enumerate(returned_in) if stage == k)
        alive = [node for node in (*alive, *body) if last_use.get(node, 0) > k]
        graph.output(tuple(now[gradients[i]] for i in mine) + tuple(now[node] for node in alive))
        stages.append(Stage(graph, mine))
    return tuple(stages)


def _last_use(stage_of: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Per node that is read, the last stage in which it is."""
    found: dict[fx.Node, int] = {}
    for node, stage in stage_of.items():
        for arg in node.all_input_nodes if node.op != "output" else ():
            found[arg] = max(found.get(arg, 0), stage)
    return found


def _stages_of_gradients(backward: fx.Graph, stage_of: Mapping[fx.Node, int], owners: Sequence[str]) -> list[int]:
    """Per gradient, the stage that returns it."""
    read_until = _read_until(backward, _last_use(stage_of))
    gradients: Sequence[fx.Node] = results(backward)
    known = [*owners, *[""] * (len(gradients) - len(owners))]
    found: list[int] = []
    last: dict[str, int] = {}
    for node, owner in zip(gradients, known, strict=True):
        found.append(max(stage_of[node], read_until.get(owner, 0), last.get(owner, 0)))
        if owner:
            last[owner] = found[-1]
    return found


def _read_until(backward: fx.Graph, last_use: Mapping[fx.Node, int]) -> dict[str, int]:
    """Per placeholder, the last stage in which it, or a view of it, is read."""
    base = {node: node.name for node in backward.find_nodes(op="placeholder")}
    until = {name: last_use.get(node, 0) for node, name in base.items()}
    for node in (node for node in backward.nodes if node.op == "call_function"):
        viewed = next((base[arg] for arg in node.all_input_nodes if arg in base), None)
        if viewed is not None and _may_be_view(node):
            base[node] = viewed
            until[viewed] = max(until[viewed], last_use.get(node, 0))
    return until


def _may_be_view(node: fx.Node) -> bool:
    """Whether the kernel's result may share its argument's storage."""
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    return node.target in _UNDECLARED_VIEWS or any(argument.alias_info for argument in node.target._schema.arguments)
