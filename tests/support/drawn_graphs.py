"""Graphs that hypothesis drew where the solver missed the best kept set: by what it takes, with a budget and the least time."""

from __future__ import annotations

from functools import partial

from planner.graph.graph import Graph, Kind, Op, Value


def drawn(rows: str, sizes: str, once: str, outputs: str) -> Graph:
    """A graph of rows "op | reads | writes | cost | workspace"; names that `sizes` leaves out have one byte.

    Names begin with x, w, t and d for inputs, weights, output gradients and gradients. `once`: ops that may not run again.
    `outputs`: of the forward, which has six ops.
    """
    first = {"x": Kind.INPUT, "w": Kind.PARAM, "t": Kind.TANGENT, "d": Kind.GRADIENT}
    cells = [[cell.strip() for cell in row.split("|")] for row in rows.strip().splitlines()]
    ops = [
        Op(name, (name,), tuple(reads.split()), tuple(writes.split()), int(cost), int(workspace), name not in once.split())
        for name, reads, writes, cost, workspace in cells
    ]
    names = dict.fromkeys(name for op in ops for name in (*op.reads, *op.writes))
    nbytes = {name: int(size) for name, _, size in (pair.partition("=") for pair in sizes.split())}
    values = tuple(Value(name, nbytes.get(name, 1), first.get(name[0], Kind.ACTIVATION)) for name in names)
    given = tuple(name for name in names if name[0] in "xwt")
    gradients = tuple(name for name in names if name[0] == "d")
    return Graph(tuple(ops), values, given, tuple(outputs.split()), gradients, 6)


DRAWN = {
    "the only way into 40 bytes drops a0 and keeps what f2 made, and half of that is worse": (
        partial(
            drawn,
            """
        f0 | x w0           | a0      | 9 | 0
        f1 | a0             | a1 b1_  | 3 | 0
        f2 | a1 a0 w2       | a2 h2   | 1 | 3
        f3 | a2 a1          | a3      | 1 | 0
        f4 | a3             | a4      | 1 | 0
        f5 | a4             | a5      | 1 | 0
        b5 | a4 a5 t0       | g5      | 1 | 0
        b4 | a3 a4 g5       | g4      | 1 | 0
        b3 | a2 a3 g4       | g3      | 5 | 0
        b2 | a0 w2 a2 g3 h2 | g2 dw2  | 2 | -1
        b1 | a0 a1 b1_ g2 g3 | g1     | 2 | 0
        b0 | x a0 g1 g2     | dw0     | 1 | 0
        """,
            "a0=11 a1=6 a2=6 h2=6 a3=6 a4=6 a5=6 g3=3 g2=3",
            once="b2",
            outputs="a5",
        ),
        40,
        40,
    ),
    "three values away from all that the programs keep": (
        partial(
            drawn,
            """
        f0 | x              | a0 b0_  | 1 | 0
        f1 | a0             | a1      | 1 | 0
        f2 | a1 b0_         | a2 b2_  | 1 | 0
        f3 | b2_ a1         | a3      | 0 | 3
        f4 | a3             | a4      | 1 | 0
        f5 | a4             | a5 h5   | 1 | 0
        b5 | a5 t0 h5       | g5      | 1 | -5
        b4 | a3 a4 g5       | g4      | 1 | 0
        b3 | a1 a3 g4       | g3      | 1 | 0
        b2 | a1 b0_ a2 b2_ g3 | g2    | 1 | 0
        b1 | a0 a1 g2 g3    | g1      | 1 | 0
        b0 | x a0 b0_ g1 g2 t1 | dw0  | 1 | 0
        """,
            "a0=6 a1=6 a2=6 a3=6 a4=8 a5=6 h5=8 t0=2 t1=2 g5=0 g4=3",
            once="f1 b5",
            outputs="a5 b0_",
        ),
        35,
        14,
    ),
    "a plan is found, and an exchange makes it cheaper": (
        partial(
            drawn,
            """
        f0 | x w0           | a0 b0_     | 2 | 0
        f1 | a0 w1          | a1 b1_     | 5 | 0
        f2 | a1             | a2 b2_ h2  | 2 | 3
        f3 | b2_ a1 w3      | a3 h3      | 2 | 0
        f4 | a3             | a4         | 1 | 0
        f5 | a4             | a5         | 1 | 0
        b5 | a4 a5 t0       | g5         | 2 | 0
        b4 | a3 a4 g5       | g4         | 2 | 0
        b3 | b2_ a1 w3 g4 h3 | g3 dw3    | 1 | 0
        b2 | a1 a2 b2_ g3 h2 | g2        | 1 | -1
        b1 | a0 w1 a1 b1_ g2 g3 | g1 dw1 | 2 | 0
        b0 | x w0 a0 b0_ g1 t1 | dw0     | 2 | 0
        """,
            "a0=11 b0_=3 w1=2 a1=8 b1_=3 a2=8 b2_=0 h2=4 w3=2 a3=11 h3=11 a4=6 a5=6 t0=2 t1=2 g3=0 g2=0 dw1=2",
            once="b3 b2",
            outputs="a5 a0",
        ),
        58,
        32,
    ),
}
"""(graph, budget in bytes, time of the best kept set in ns)."""
