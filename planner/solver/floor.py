"""What no schedule can go below: the bytes that must be live while one single op runs."""

from __future__ import annotations

import numpy as np

from planner.errors import InfeasibleBudgetError
from planner.graph.graph import Graph, Kind
from planner.units import format_bytes


def floor(graph: Graph) -> tuple[int, int]:
    """The least peak that any schedule of this graph in its captured backward order can reach.

    While an op runs for the first time, these are live: everything resident (tangents in the
    backward), outputs handed out so far, what it reads and writes, its workspace, and what was
    written by an op that cannot run again and is read later.

    Returns:
        bytes, and the index of the op that needs them (-1 for a graph without ops).
    """
    tangents = sum(value.nbytes for value in graph.values if value.kind is Kind.TANGENT)
    resident = sum(graph.value[name].nbytes for name in graph.inputs) - tangents
    if not graph.ops:
        return resident, -1
    need = np.full(len(graph.ops), resident, dtype=np.int64)
    need[graph.num_forward_ops :] += tangents
    inputs, outputs = set(graph.inputs), {*graph.forward_outputs, *graph.backward_outputs}
    for name in outputs - inputs:
        need[graph.producer[name] :] += graph.value[name].nbytes
    last_read = {name: i for i, op in enumerate(graph.ops) for name in op.reads}
    for i, op in enumerate(graph.ops):
        need[i] += op.workspace_bytes
        for name in set(op.writes) - outputs:
            nbytes = graph.value[name].nbytes
            need[i] += nbytes
            if not op.recomputable:
                need[i + 1 : last_read.get(name, i) + 1] += nbytes
        for name in set(op.reads) - inputs - outputs:
            if graph.ops[graph.producer[name]].recomputable:
                need[i] += graph.value[name].nbytes
    worst = int(need.argmax())
    return int(need[worst]), worst


def infeasible(graph: Graph, budget_bytes: int) -> InfeasibleBudgetError:
    """The error for a budget below the floor: which op needs how much, for which values, and what to do."""
    least, i = floor(graph)
    culprit = ""
    if i >= 0:
        op = graph.ops[i]
        touched = sorted({*op.reads, *op.writes}, key=lambda name: (-graph.value[name].nbytes, name))
        listed = [f"{name} {format_bytes(graph.value[name].nbytes)}" for name in touched[:4]]
        if op.workspace_bytes:
            listed.append(f"workspace {format_bytes(op.workspace_bytes)}")
        where = f", {op.source}" if op.source else ""
        culprit = f" (op {op.name}{where}, holds {format_bytes(least)} while it runs: {', '.join(listed)})"
    return InfeasibleBudgetError(
        f"budget {format_bytes(budget_bytes)} is below {format_bytes(least)}, the least any schedule of this graph can reach"
        f"{culprit}. Raise the budget to {format_bytes(least)}, or reduce the batch.",
        budget_bytes=budget_bytes,
        floor_bytes=least,
    )
