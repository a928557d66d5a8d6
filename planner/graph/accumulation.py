"""Gradient accumulation (second and later micro-steps).

G bytes of gradients are resident; each new gradient is added to its buffer at the end of its backward stage, then freed. So it
is not an output of the step: an op that takes no time, at the end of each stage, reads the stage's gradients. The first
micro-step needs no more, because its gradients so far are at most G bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.graph.graph import Graph, Kind, Op, Value, reserved_name

HELD = reserved_name("gradients of earlier micro-steps")
"""The reserved value that stands for them."""


def values_set_aside(graph: Graph) -> list[Value]:
    """The values that stand for bytes beside the step: all that are reserved, but for gradients of earlier micro-steps."""
    return [value for value in graph.values if value.kind is Kind.RESERVED and value.name != HELD]


STAGE_END = "(stage of the backward ends)"
"""The kernel of the ops that end stages."""


def accumulating(
    graph: Graph, gradients: Sequence[str], held_bytes: int, num_stages: int | None, owners: Sequence[str] = ()
) -> Graph:
    """The graph of a step that adds its gradients to those of earlier micro-steps.

    Args:
        graph: of a step that returns all its gradients.
        gradients: per gradient of a parameter, the value that holds it.
        held_bytes: bytes of the gradients of earlier micro-steps.
        num_stages: maximum number of backward stages, each with about the same number of ops that write gradients. As many as
            the graph then has give the same graph again. None: without stages, each gradient is added once it is there, as by
            eager.
        owners: per gradient, the value that holds its parameter. A stage returns no gradient before that is last read: an
            optimizer may step inside of the backward.
    """
    order = sorted({graph.producer[name] for name in gradients if name in graph.producer})
    count = max(1, len(order) if num_stages is None else min(num_stages, len(order)))
    ends = [order[(k + 1) * len(order) // count - 1] for k in range(count)] if order else []
    if ends and num_stages is not None:
        ends[-1] = len(graph.ops) - 1  # what comes after the last gradient belongs to its stage
    mine = [name for name in dict.fromkeys(gradients) if name in graph.producer]
    since = {name: graph.producer[name] for name in mine}  # the op after which a gradient can be returned
    if num_stages is not None:
        last_read = {name: p for p in graph.backward_ops for name in graph.ops[p].reads}
        for name, owner in zip(gradients, owners, strict=False):
            if name in since:
                since[name] = max(since[name], last_read.get(owner, -1))
    ops: list[Op] = list(graph.ops[: graph.num_forward_ops])
    for i in graph.backward_ops:
        ops.append(graph.ops[i])
        if i in ends:
            before = ends[ends.index(i) - 1] if ends.index(i) else -1
            returned = tuple(name for name in mine if before < since[name] <= i)
            name = f"(stage {ends.index(i)})"
            ops.append(Op(name, (), returned, (), 0, recomputable=False, kernel=STAGE_END))
    held = Value(HELD, held_bytes, Kind.RESERVED)
    return replace(
        graph,
        ops=tuple(ops),
        values=(*graph.values, held),
        inputs=(*graph.inputs, held.name),
        backward_outputs=tuple(name for name in graph.backward_outputs if name not in mine),
    )


def num_stages(graph: Graph) -> int:
    """Stages that the graph of an accumulating step has; 0 for any other graph."""
    return sum(op.kernel == STAGE_END for op in graph.ops)
