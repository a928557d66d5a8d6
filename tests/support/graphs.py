"""Small training steps drawn by hand. Forward on the left, backward on the right, time runs down then up.

Sizes are single bytes and costs single nanoseconds, so that every number can be checked in the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.graph.graph import RESIDENT_KINDS, Graph, Kind, Op, Value
from planner.graph.source import NOWHERE, Source

KINDS = {"x": Kind.INPUT, "w": Kind.PARAM, "b": Kind.BUFFER, "t": Kind.TANGENT, "d": Kind.GRADIENT}
"""Kind by the first letter of a value's name; every other letter is an activation."""


def op(
    name: str,
    reads: str,
    writes: str,
    cost: int = 1,
    workspace: int = 0,
    *,
    recomputable: bool = True,
    source: Source = NOWHERE,
) -> Op:
    """An op whose reads and writes are given as one string of names each."""
    return Op(name, (name,), tuple(reads.split()), tuple(writes.split()), cost, workspace, recomputable, source)


def graph(sizes: Mapping[str, int], forward: Sequence[Op], backward: Sequence[Op], outputs: str, gradients: str = "") -> Graph:
    """A graph whose kinds are read from the first letters of its values' names."""
    values = tuple(Value(name, nbytes, KINDS.get(name[0], Kind.ACTIVATION)) for name, nbytes in sizes.items())
    return Graph(
        ops=(*forward, *backward),
        values=values,
        inputs=tuple(value.name for value in values if value.kind in RESIDENT_KINDS),
        forward_outputs=tuple(outputs.split()),
        backward_outputs=tuple(gradients.split()),
        num_forward_ops=len(forward),
    )


def _sizes(names: str, nbytes: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), nbytes)


def chain() -> Graph:
    """Three layers; every backward op reads its layer's input.

    x --f0--> a --f1--> c --f2--> loss
              |         |          |
    dw <-b0-- ga <-b1-- gc <--b2-- t
    """
    return graph(
        {"x": 2, "w": 3, "a": 8, "c": 8, "loss": 1, "t": 1, "gc": 4, "ga": 4, "dw": 3},
        [op("f0", "x w", "a", 5), op("f1", "a", "c", 3), op("f2", "c", "loss", 2)],
        [op("b2", "c t", "gc", 2), op("b1", "a gc", "ga", 3), op("b0", "x ga", "dw", 5)],
        "loss",
        "dw",
    )


def diamond() -> Graph:
    """Two branches from one value, joined again; either branch can be recomputed from it.

              +--left---> l --+
    x --f0--> a               join--> loss
              +--right--> r --+
    """
    return graph(
        {"x": 2, "w": 1, "a": 4, "l": 8, "r": 6, "loss": 1, "t": 1, "gl": 8, "gr": 6, "ga": 4, "dw": 1},
        [op("f0", "x w", "a", 6), op("left", "a", "l", 2), op("right", "a", "r", 3), op("join", "l r", "loss", 1)],
        [op("bjoin", "l r t", "gl gr", 2), op("bbranch", "a l gl gr", "ga", 4), op("b0", "x ga", "dw", 6)],
        "loss",
        "dw",
    )


def skip() -> Graph:
    """A U: the first value is read again by the last layer, so that it crosses everything in between.

    x --f0--> a --f1--> m --f2--> n --f3--> loss
              +------------------------^
    """
    return graph(
        {"x": 2, "w": 1, "a": 9, "m": 7, "n": 6, "loss": 1, "t": 1, "gn": 2, "gs": 2, "gm": 2, "ga": 2, "dw": 1},
        [op("f0", "x w", "a", 4), op("f1", "a", "m", 7), op("f2", "m", "n", 3), op("f3", "a n", "loss", 2)],
        [
            op("b3", "a n t", "gn gs", 2),
            op("b2", "m gn", "gm", 3),
            op("b1", "a gm gs", "ga", 7),
            op("b0", "x ga", "dw", 4),
        ],
        "loss",
        "dw",
    )


def two_outputs() -> Graph:
    """The user keeps a hidden value beside the loss; each has its own tangent, and the head's gradient joins the other.

    x --f0--> a --f1--> hidden (kept)
              +---f2--> e --f3--> loss
    """
    return graph(
        {"x": 2, "w": 2, "a": 8, "hidden": 4, "e": 8, "loss": 1, "t0": 4, "t1": 1, "ge": 3, "gh": 3, "ga": 3, "dw": 2, "dx": 2},
        [op("f0", "x w", "a", 5), op("f1", "a", "hidden", 4), op("f2", "a", "e", 1), op("f3", "e", "loss", 2)],
        [
            op("b3", "e t1", "ge", 2),
            op("b2", "a ge", "gh", 1),
            op("b1", "a hidden t0 gh", "ga", 4),
            op("b0", "x w ga", "dw dx", 9),
        ],
        "hidden loss",
        "dw dx",
    )


def statistics() -> Graph:
    """A normalisation with a large output and a small statistic: two values of one op.

    x --f0--> a --norm--> n (large), stat (small)
                          n --f2--> z --f3--> loss
    """
    return graph(
        {"x": 1, "w": 1, "a": 8, "n": 8, "stat": 1, "z": 8, "loss": 1, "t": 1, "gz": 2, "gn": 2, "ga": 2, "dw": 1},
        [op("f0", "x w", "a", 6), op("norm", "a", "n stat", 3, 2), op("f2", "n", "z", 4), op("f3", "z", "loss", 2)],
        [op("b3", "z t", "gz", 2), op("b2", "n gz", "gn", 4), op("bnorm", "a stat gn", "ga", 3, 1), op("b0", "x ga", "dw", 6)],
        "loss",
        "dw",
    )


def dropout() -> Graph:
    """The state of the random number generator is a value: read once, kept, and then the mask can be drawn again.

    state (cannot run again) --> seed --+
    x --f0----------------------> a --drop--> y, mask
                                              y --f2--> z --f3--> loss
    """
    return graph(
        {
            **_sizes("x w seed loss t dw", 1),
            **_sizes("gz gy ga", 2),
            "a": 4,
            "y": 8,
            "mask": 8,
            "z": 12,
        },
        [
            op("state", "", "seed", 1, recomputable=False),
            op("f0", "x w", "a", 6),
            op("drop", "a seed", "y mask", 3),
            op("f2", "y", "z", 7),
            op("f3", "z", "loss", 2),
        ],
        [op("b3", "z t", "gz", 2), op("b2", "y gz", "gy", 7), op("bdrop", "mask gy", "ga", 3), op("b0", "x ga", "dw", 6)],
        "loss",
        "dw",
    )


def blocks(count: int) -> Graph:
    """A chain of equal blocks, each of three ops: a wide value inside, whose inputs and results the backward wants."""
    inside = {f"{kind}{i}": nbytes for i in range(count) for kind, nbytes in (("a", 8), ("m", 12), ("c", 4), ("g", 4))}
    forward, backward = [], []
    for i in range(count):
        before = f"c{i - 1}" if i else "x"
        forward.append(op(f"fa{i}", before, f"a{i}", 3))
        forward.append(op(f"fm{i}", f"a{i}", f"m{i}", 2))
        forward.append(op(f"fc{i}", f"m{i} {before}", f"c{i}", 4))
    forward.append(op("floss", f"c{count - 1}", "loss", 1))
    for i in reversed(range(count)):
        after = f"g{i + 1}" if i + 1 < count else "t"
        backward.append(op(f"b{i}", f"a{i} m{i} {after}", f"g{i}", 9))
    return graph({"x": 1, "t": 1, "loss": 1, **inside}, forward, backward, "loss", "g0")


def in_modules() -> Graph:
    """Four blocks of two ops in modules h.0 .. h.3, then a loss outside of them."""
    forward, backward = [], []
    for i in range(4):
        before = f"c_{i - 1}" if i else "x"
        forward.append(op(f"fa{i}", before, f"a_{i}", 3, source=Source(f"h.{i}.up", "model.py", 1)))
        forward.append(op(f"fc{i}", f"a_{i}", f"c_{i}", 4, source=Source(f"h.{i}.down", "model.py", 2)))
    forward.append(op("floss", "c_3", "loss", 1, source=Source(file="model.py", line=9)))
    for i in reversed(range(4)):
        after = f"g_{i + 1}" if i < 3 else "t"
        backward.append(op(f"b{i}", f"a_{i} c_{i} {after}", f"g_{i}", 9))
    sizes = {f"{kind}_{i}": nbytes for i in range(4) for kind, nbytes in (("a", 8), ("c", 4), ("g", 4))}
    return graph({"x": 1, "t": 1, "loss": 1, **sizes}, forward, backward, "loss", "g_0")


def many_modules(count: int) -> Graph:
    """A chain of modules m_a, m_b, ..., each keeping one byte more than the one before."""
    names = [f"a_{i}" for i in range(count)]
    sources = [Source(f"m_{chr(ord('a') + i)}", "model.py", i + 1) for i in range(count)]
    forward = [op(f"f{i}", names[i - 1] if i else "x", names[i], source=sources[i]) for i in range(count)]
    backward = [op(f"b{i}", f"{names[i]} {f'g_{i + 1}' if i + 1 < count else 't'}", f"g_{i}") for i in reversed(range(count))]
    sizes = {"x": 1, "t": 1, "loss": 1, **{name: i + 1 for i, name in enumerate(names)}, **{f"g_{i}": 1 for i in range(count)}}
    return graph(sizes, [*forward, op("floss", names[-1], "loss")], backward, "loss", "g_0")


SMALL = {make.__name__: make for make in (chain, diamond, skip, two_outputs, statistics, dropout)}
"""All of the above by name."""


def freeing(nbytes: int, workspace: int, *, recomputable: bool = False) -> Graph:
    """x -> f -> a, h; b reads both, and frees the handle h of `nbytes` bytes as it goes."""
    backward = replace(op("b", "a h t", "g", 1), workspace_bytes=workspace, recomputable=recomputable)
    values = (
        Value("x", 1, Kind.INPUT),
        Value("t", 4, Kind.TANGENT),
        Value("a", 4, Kind.ACTIVATION),
        Value("h", nbytes, Kind.ACTIVATION),
        Value("g", 3, Kind.GRADIENT),
    )
    return Graph((op("f", "x", "a h", 1), backward), values, ("x", "t"), ("a",), ("g",), 1)
