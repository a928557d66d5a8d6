"""Gradients of inputs that are used several times: autograd's engine adds up the terms, as it does in eager.

The captured graph adds up one use's gradient after the other, last use first. If the caller uses the same tensor again after
the planned call, its gradient comes first in eager's sum, and floating-point sums depend on the order. So the backward returns
the terms one by one, each for an edge of its own, where memory allows that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from planner._compat.fx_graphs import IS_GRADIENT_SUM, results
from planner.graph.graph import Graph
from planner.graph.schedule import Schedule
from planner.graph.simulate import simulate
from planner.tracer.joint import Joint
from planner.tracer.storage import Storages

_ADD = torch.ops.aten.add.Tensor


def separable(joint: Joint, graph: Graph, schedule: Schedule) -> dict[str, int]:
    """Gradients whose terms the backward can return one by one without a higher peak, by name: the number of additions.

    The terms live until the backward ends, and autograd may need as much again for their sum.

    Args:
        joint: the captured step.
        graph: `lower(joint)`.
        schedule: valid for `graph`.
    """
    nodes = {node.name: node for node in joint.graph.nodes}
    timeline = simulate(graph, schedule)
    live = np.array((*timeline.live_bytes, timeline.live_bytes[-1]), dtype=np.int64)  # and when autograd has the terms
    step_of = {name: t for t, i in enumerate(schedule.steps) for name in graph.ops[i].nodes}
    root = Storages(joint.graph).root
    found: dict[str, int] = {}
    for given, name in joint.gradients:
        uses = joint.uses.get(given.node, 0)
        sums = list(itertools.islice(_additions(nodes[name]), max(0, uses - 1)))
        if not sums or len(sums) != uses - 1 or any(node.name not in step_of for node in sums):
            continue
        first = min(step_of[node.name] for node in sums)
        nbytes = graph.value[root[nodes[name]]].nbytes
        extra = np.zeros_like(live)
        extra[first + 1 :] = (uses - 1) * nbytes  # the terms instead of one sum
        extra[-1] += nbytes
        if uses == 2 and first == len(schedule.steps) - 1:
            extra[-1] = 0  # that step held two terms and their sum already
        if int((live + extra).max()) <= timeline.peak_bytes:
            live += extra
            found[name] = len(sums)
    return found


def _additions(gradient: fx.Node) -> Iterator[fx.Node]:
    """Autograd's own additions that a gradient ends with, last one first."""
    while gradient.target is _ADD and gradient.meta.get(IS_GRADIENT_SUM) and not gradient.kwargs and len(gradient.users) == 1:
        first, second = gradient.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return
        if not _form(first) == _form(gradient) == _form(second):
            return
        yield gradient
        gradient = first


def _form(node: fx.Node) -> object:
    return node.meta["val"].shape, node.meta["val"].dtype


@dataclass(frozen=True, slots=True)
class Terms:
    """A backward graph that returns terms of sums.

    Attributes:
        graph: results are as many as before, of a sum its first term; then the other terms.
        gradient_of: per further result, the position of the gradient that it is a term of.
        ends: as of `PartitionedStep.stage_ends`.
    """

    graph: fx.Graph
    gradient_of: tuple[int, ...]
    ends: tuple[int, ...]


def separated(backward: fx.Graph, additions: Mapping[str, int], ends: Sequence[int]) -> Terms:
    """Return the terms of these gradients one by one, first terms first.

    Args:
        backward: results are gradients.
        additions: from `separable`; others are passed over, as in a graph that users have edited.
        ends: numbers of leading nodes where stages end.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(backward, copies)
    order = {node: i for i, node in enumerate(backward.nodes)}
    returned: list[fx.Node] = []
    further: list[tuple[int, fx.Node]] = []
    removed: list[fx.Node] = []
    for i, gradient in enumerate(results(backward)):
        terms: list[fx.Node] = []
        for _ in range(additions.get(gradient.name, 0)):
            if gradient.target is not _ADD or len(gradient.users) != 1:
                break
            first, second = gradient.args
            terms.insert(0, second)
            removed.append(gradient)
            gradient = first
        returned.append(copies[gradient])
        further += [(i, copies[term]) for term in terms]
    graph.output((*returned, *(term for _, term in further)))
    for node in removed:
        graph.erase_node(copies[node])
    left = tuple(end - sum(order[node] < end for node in removed) for end in ends)
    return Terms(graph, tuple(i for i, _ in further), left)
