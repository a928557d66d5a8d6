"""A hand-drawn step of equal blocks, and the graph of one block: chains of ops with a backward op each."""

from __future__ import annotations

from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value
from planner.graph.source import Source

COSTS = (3, 9, 1, 4)
"""Time of a block's forward ops; their backward ops take twice as long."""
SIZES = (8, 4, 8, 2)
"""Bytes that they write; what a block returns is the last."""


def block(first: int = 2) -> Graph:
    """A block alone. `first`: bytes of what it is given."""
    ops, values = _block("", "x", "dy")
    given = [Value("x", first, Kind.INPUT), Value("w", 5, Kind.PARAM), Value("dy", SIZES[-1], Kind.TANGENT)]
    count = len(COSTS)
    return Graph(
        ops=tuple(ops),
        values=(*given, *values),
        inputs=("x", "w", "dy"),
        forward_outputs=(f"a{count - 1}",),
        backward_outputs=("dx", "dw"),
        num_forward_ops=count,
    )


def _block(name: str, given: str, gradient: str) -> tuple[list[Op], list[Value]]:
    """Ops, forward first, and the values that they write."""
    source, count = Source(module=name), len(COSTS)
    ops: list[Op] = []
    values: list[Value] = []
    last = given
    for i in range(count):
        reads = (last, f"{name}w") if i == 1 else (last,)
        ops.append(Op(f"{name}f{i}", (), reads, (f"{name}a{i}",), COSTS[i], workspace_bytes=i, source=source, kernel=f"f{i}"))
        values.append(Value(f"{name}a{i}", SIZES[i], Kind.ACTIVATION))
        last = f"{name}a{i}"
    flows = gradient
    for i in reversed(range(count)):
        before = given if i == 0 else f"{name}a{i - 1}"
        written = [f"{name}dx" if i == 0 else f"{name}d{i}", *([f"{name}dw"] if i == 1 else [])]
        reads = tuple(dict.fromkeys((flows, before, f"{name}a{i}")))
        ops.append(
            Op(f"{name}b{i}", (), reads, tuple(written), 2 * COSTS[i], recomputable=False, source=source, kernel=f"b{i}")
        )
        values.append(Value(written[0], 2 if i == 0 else SIZES[i - 1], Kind.GRADIENT))
        values += [Value(f"{name}dw", 5, Kind.GRADIENT)] if i == 1 else []
        flows = written[0]
    return ops, values


def whole(num_blocks: int) -> Graph:
    """Outer code around equal blocks in a row, as the capture of the whole step has it."""
    forward: list[Op] = [Op("embed", (), ("tokens",), ("h",), 2, source=Source(module="embed"), kernel="embed")]
    values = [Value("tokens", 3, Kind.INPUT), Value("h", 2, Kind.ACTIVATION)]
    backward: list[Op] = []
    last = "h"
    for k in range(num_blocks):
        gradient = f"blocks.{k + 1}dx" if k + 1 < num_blocks else "dlast"
        ops, own = _block(f"blocks.{k}", last, gradient)
        forward += ops[: len(COSTS)]
        backward = ops[len(COSTS) :] + backward
        values += [Value(f"blocks.{k}w", 5, Kind.PARAM), *own]
        last = f"blocks.{k}a{len(COSTS) - 1}"
    forward.append(Op("head", (), (last,), ("logits",), 5, workspace_bytes=3, source=Source(module="head"), kernel="head"))
    backward.insert(0, Op("dhead", (), ("dloss", last, "logits"), ("dlast",), 5, recomputable=False, kernel="dhead"))
    backward.append(Op("dembed", (), ("blocks.0dx",), ("dtable",), 2, recomputable=False, kernel="dembed"))
    values += [Value("logits", 9, Kind.ACTIVATION), Value("dloss", 1, Kind.TANGENT)]
    values += [Value("dlast", 2, Kind.GRADIENT), Value("dtable", 6, Kind.GRADIENT)]
    return Graph(
        ops=(*forward, *backward),
        values=tuple(values),
        inputs=tuple(value.name for value in values if value.kind in RESIDENT_KINDS),
        forward_outputs=("logits",),
        backward_outputs=("dtable", *(f"blocks.{k}dw" for k in range(num_blocks))),
        num_forward_ops=len(forward),
    )
