"""The backward graph cut into stages, so that gradients leave it as soon as they are complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from planner._torch import results


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


def cut_stages(backward: fx.Graph, num_stages: int) -> tuple[Stage, ...]:
    """Cut after gradients, about as many in every stage; order and count of the nodes stay as they are.

    Args:
        backward: with one output node of a tuple of gradients.
        num_stages: at most this many.
    """
    handed: Sequence[fx.Node] = results(backward)
    order = {node: i for i, node in enumerate(backward.nodes)}
    completed = sorted({order[node] for node in handed})
    num_stages = max(1, min(num_stages, len(completed)))
    cuts = [completed[(k + 1) * len(completed) // num_stages - 1] for k in range(num_stages - 1)]
    stage_of = {node: sum(position > cut for cut in cuts) for node, position in order.items()}

    last_use: dict[fx.Node, int] = {}
    for node, stage in stage_of.items():
        if node.op == "output":
            continue
        for arg in node.all_input_nodes:
            last_use[arg] = max(last_use.get(arg, 0), stage)
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
        mine = tuple(i for i, node in enumerate(handed) if stage_of[node] == k)
        alive = [node for node in (*alive, *body) if last_use.get(node, 0) > k]
        graph.output(tuple(now[handed[i]] for i in mine) + tuple(now[node] for node in alive))
        stages.append(Stage(graph, mine))
    return tuple(stages)
