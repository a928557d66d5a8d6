"""Beyond the captured order: backward ops move a few places where that lowers the plain step's peak.

Results cannot change: ops of the backward write new values only, so any order that respects who reads what computes the same
bits; the user's random numbers and buffer updates are forward ops, and stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from planner.graph.accumulation import STAGE_END
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.solver.tuning import FEW


def reordered(graph: Graph) -> tuple[Graph, tuple[int, ...]]:
    """The graph with its backward ops moved, and for each of its ops the index in `graph`.

    It is the graph itself where moving does not lower the peak of the plain step, as `simulate` counts it.
    """
    captured = tuple(range(len(graph.ops)))
    order = captured if graph.backward_is_fixed else (*range(graph.num_forward_ops), *_backward_order(graph))
    if order == captured:
        return graph, captured
    moved = replace(graph, ops=tuple(graph.ops[i] for i in order))
    lower = simulate(moved, keep_all(moved)).peak_bytes < simulate(graph, keep_all(graph)).peak_bytes
    return (moved, order) if lower else (graph, captured)


def _backward_order(graph: Graph) -> list[int]:
    """Of the next few backward ops that could run, always the one after which least is alive.

    A forward value counts from its first reader in the backward to its last, as where it is recomputed just before need.
    """
    constant = graph.pinned
    nbytes = {value.name: value.nbytes for value in graph.values}
    reads = {p: [name for name in dict.fromkeys(graph.ops[p].reads) if name not in constant] for p in graph.backward_ops}
    left = Counter(name for names in reads.values() for name in names)
    at_hand: set[str] = set()
    waiting = {name for p in graph.backward_ops for name in graph.ops[p].writes}
    todo, order = list(graph.backward_ops), []

    def growth(p: int) -> int:
        op = graph.ops[p]
        comes = sum(nbytes[name] for name in reads[p] if name not in at_hand)
        comes += sum(nbytes[name] for name in op.writes if left[name] or name in constant)
        return comes - sum(nbytes[name] for name in reads[p] if left[name] == 1)

    while todo:
        # a stage ends after all that it has run: what reads a parameter may not move behind the end that returns its gradient
        able = [p for p in todo[: FEW + 1] if p == todo[0] or graph.ops[p].kernel != STAGE_END]
        ready = [p for p in able if waiting.isdisjoint(graph.ops[p].reads)]
        chosen = min(ready, key=lambda p: (growth(p), p))
        todo.remove(chosen)
        order.append(chosen)
        waiting.difference_update(graph.ops[chosen].writes)
        at_hand.update(reads[chosen], graph.ops[chosen].writes)
        left.subtract(reads[chosen])
    return order
