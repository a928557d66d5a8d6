"""What no schedule can go below: the bytes that must be live while one single op runs; and what would lower that."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.errors import InfeasibleBudgetError
from planner.graph.graph import Graph, Kind, Op, freed_early, purpose_of
from planner.units import enough_text, format_bytes

_REMEDIES = (
    (("log_softmax", "nll_loss", "cross_entropy"), "compute the loss in chunks of tokens, so that no op holds all logits"),
    (("_softmax", "softmax_backward", "bmm"), "use fused attention (scaled_dot_product_attention), which holds no scores"),
    (("convolution",), "use a convolution algorithm with less workspace, or smaller images"),
    (("embedding",), "use a sparse or smaller embedding"),
)
"""By parts of an op's name, what keeps it from needing so much, other than a smaller batch."""


def floor(graph: Graph) -> tuple[int, int]:
    """The least peak that any schedule of this graph in its captured backward order can reach.

    Returns:
        bytes, and the index of the op that needs them (-1 for a graph without ops).
    """
    if not graph.ops:
        return graph.resident_bytes, -1
    need = least_bytes(graph)
    worst = int(need.argmax())
    return int(need[worst]), worst


def least_bytes(graph: Graph) -> NDArray[np.int64]:
    """Per op, the bytes that are live while it runs for the first time, in every schedule.

    These are: everything resident (in the backward, gradients of outputs too), outputs written so far and those of other
    forwards in flight, what it reads and writes, its workspace, and what was written by an op that cannot run again and is
    read later.
    """
    need = np.full(len(graph.ops), graph.resident_bytes, dtype=np.int64)
    need += (graph.in_flight - 1) * sum(graph.value[name].nbytes for name in set(graph.forward_outputs) - set(graph.inputs))
    need[graph.num_forward_ops :] += graph.tangent_bytes
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
    return need


def floor_parts(graph: Graph) -> tuple[tuple[str, int], ...]:
    """What the floor consists of: (what, bytes), summing up to `floor(graph)`; empty where nothing is held."""
    nbytes, i = floor(graph)
    in_backward = i >= graph.num_forward_ops
    given: dict[str, int] = {}
    for name in graph.inputs:
        value = graph.value[name]
        if value.kind is not Kind.TANGENT or in_backward:
            what = purpose_of(name) if value.kind is Kind.RESERVED else _GIVEN[value.kind]
            given[what] = given.get(what, 0) + value.nbytes
    parts = list(given.items())
    if i >= 0:
        written = [name for name in graph.forward_outputs if graph.producer.get(name, i + 1) <= i]
        gradients = [name for name in graph.backward_outputs if graph.producer.get(name, i + 1) <= i and name not in written]
        others = (graph.in_flight - 1) * _sum(graph, graph.forward_outputs)
        parts += [("outputs", _sum(graph, written)), ("outputs of other forwards in flight", others)]
        parts.append(("gradients so far", _sum(graph, gradients)))
        own = _own(graph, graph.ops[i])
        listed = list(own.items())[:_LISTED]
        parts += [(name, size) for name, size in listed]
        parts.append(("what else the op reads and writes", sum(own.values()) - sum(size for _, size in listed)))
    parts.append(("what cannot be recomputed", nbytes - sum(size for _, size in parts)))
    return tuple((what, size) for what, size in parts if size)


def floor_advice(graph: Graph, *, is_least_batch: bool = False) -> str:
    """What would lower the floor, in words.

    Args:
        is_least_batch: the model runs no smaller one.
    """
    nbytes, i = floor(graph)
    return _advice(graph, i, nbytes, is_least_batch=is_least_batch)


def has_one_sample(graph: Graph) -> bool:
    """Whether every tensor of the call has one row, so that there is no smaller batch; False where that is not known."""
    shapes = [_SHAPE.search(value.form) for value in graph.values if value.kind is Kind.INPUT]
    rows = [shape.group(1) for shape in shapes if shape]
    return len(rows) == len(shapes) and "1" in rows and {*rows} <= {"", "1"}


_SHAPE = re.compile(r"\[(\d*)")
"""Of a value's form, its first size; none of a scalar."""
_GIVEN = {
    Kind.PARAM: "parameters",
    Kind.BUFFER: "buffers",
    Kind.INPUT: "inputs",
    Kind.TANGENT: "gradients of outputs",
}
_LISTED = 4
"""Of what an op reads and writes, the largest are named."""


def _sum(graph: Graph, names: Iterable[str]) -> int:
    return sum(graph.value[name].nbytes for name in set(names) - set(graph.inputs))


def infeasible(graph: Graph, budget_bytes: int) -> InfeasibleBudgetError:
    """The error for a budget below the floor: which op needs how much, for which values, and what would lower it most."""
    least, i = floor(graph)
    culprit = _culprit(graph, i, least) if i >= 0 else ""
    advice, cure = _advice(graph, i, least), f"Raise the budget to {enough_text(least)}"
    return InfeasibleBudgetError(
        infeasible_text(f"budget {format_bytes(budget_bytes)}", least, culprit, cure, advice),
        budget_bytes=budget_bytes,
        floor_bytes=least,
        culprit=culprit,
        advice=advice,
    )


def infeasible_text(budget: str, least: int, culprit: str, cure: str, advice: str) -> str:
    """The message of an InfeasibleBudgetError.

    Args:
        budget: what was asked for, in words.
        least: bytes, the floor.
        culprit, advice: as in the error.
        cure: what to do first.
    """
    held = f" ({culprit})" if culprit else ""
    more = f". Or {advice}" if advice else ""
    return f"{cure}: {budget} is below {enough_text(least)}, the least any schedule of this graph can reach{held}{more}"


def _own(graph: Graph, op: Op) -> dict[str, int]:
    """What an op reads, writes and works in, the largest first; what is resident or an output is left aside."""
    constant = {*graph.inputs, *graph.forward_outputs, *graph.backward_outputs}
    freed = freed_early(graph, op)
    sizes = {name: graph.value[name].nbytes - freed.get(name, 0) for name in {*op.reads, *op.writes} - constant}
    if op.workspace_bytes > 0:
        sizes["workspace"] = op.workspace_bytes
    return dict(sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0])))


def _culprit(graph: Graph, i: int, least: int) -> str:
    op = graph.ops[i]
    own = _own(graph, op)
    listed = [f"{name} {format_bytes(nbytes)}" for name, nbytes in list(own.items())[:_LISTED]]
    rest = least - sum(list(own.values())[:_LISTED])
    if rest > 0:
        listed.append(f"{format_bytes(rest)} of parameters, gradients and others")
    where = f", {op.source}" if op.source else ""
    return f"op {op.name}{where}, holds {format_bytes(least)} while it runs: {', '.join(listed)}"


def _advice(graph: Graph, i: int, least: int, *, is_least_batch: bool = False) -> str:
    """What would lower the floor: the batch, another kernel for the op that holds it, or what is resident."""
    reserves = any(graph.value[name].kind is Kind.RESERVED for name in graph.inputs)
    less = ", or reserve less" if reserves else ""
    if i < 0:
        return f"use a smaller model{less}"
    op = graph.ops[i]
    own = sum(_own(graph, op).values())
    # Activations grow with the batch; parameters, gradients and what is reserved do not.
    ways = (
        []
        if is_least_batch or has_one_sample(graph)
        else [f"reduce the batch (half of it needs about {format_bytes(least - own // 2)})"]
    )
    remedy = next((text for parts, text in _REMEDIES if any(part in op.name for part in parts)), None)
    if remedy and own > least // 4:
        needs = least_bytes(graph)
        alike = [j for j, other in enumerate(graph.ops) if _alike(op, other)]
        needs[alike] = 0
        following = int(needs.argmax())
        if needs[following] < least:
            after = f"{graph.ops[following].name}, needs {format_bytes(int(needs[following]))}"
            ways.append(f"{remedy} (the next to hold most, {after})")
    advice = ", or ".join(ways or ["use a smaller model"])
    if least - own > least // 2:
        rest = format_bytes(least - own)
        advice += f"; {rest} of it do not depend on the batch: use fewer bytes a parameter{less}"
    return advice


def _alike(op: Op, other: Op) -> bool:
    """The same remedy helps both."""
    return any(any(part in op.name for part in parts) and any(part in other.name for part in parts) for parts, _ in _REMEDIES)
