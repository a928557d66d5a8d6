"""A graph without its names: what two captures of one step have in common when their nodes have different names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from planner.graph.graph import Graph, Kind

Place = tuple[int, int]
"""Where a value comes from: (op that writes it, position among its results); for an input (-1, position among the inputs)."""
_SHOWN = 60
_CAST = "aten._to_copy.default"
"""The kernel by which autocast casts."""


def places(graph: Graph) -> dict[str, Place]:
    """Place by value name; reserved bytes, which are the user's and read by nobody, have none."""
    given = [name for name in graph.inputs if graph.value[name].kind is not Kind.RESERVED]
    found = {name: (-1, i) for i, name in enumerate(given)}
    found.update((name, (i, k)) for i, op in enumerate(graph.ops) for k, name in enumerate(op.writes))
    return found


def wiring(graph: Graph) -> list[Any]:
    """What does not depend on the sizes of the inputs: kernels, which results they read, kinds of values, outputs."""
    place = places(graph)

    def at(names: Sequence[str]) -> list[Place]:
        return [place[name] for name in names]

    rows: list[Any] = [graph.value[name].kind.value for name in place if place[name][0] < 0]
    rows += [[op.kernel, at(op.reads), len(op.writes)] for op in graph.ops]
    return [*rows, at(graph.forward_outputs), at(graph.backward_outputs), graph.num_forward_ops]


def fingerprint(graph: Graph, *, arguments: bool = True) -> str:
    """32 hex digits of the graph's structure: equal for two captures of one step that name their nodes differently.

    Ops count by kernel, arguments (shapes and scalars), the places of what they read, bytes of what they write, and whether
    they may run again; values by place, kind and bytes. Names, sources, reserved bytes and what is measured do not count.

    Args:
        arguments: False leaves them out: among them may be which part of a tensor a rank works on.
    """
    rows = wiring(graph)
    rows += [[op.arguments if arguments else "", op.recomputable] for op in graph.ops]
    rows += [_known_bytes(graph, name) for name in places(graph)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def renamed(graph: Graph, like: Graph) -> Graph:
    """The graph under the names and sources of another one of equal wiring; bytes, costs and reserved bytes stay."""
    theirs = {place: name for name, place in places(like).items()}
    name = {value.name: value.name for value in graph.values} | {mine: theirs[at] for mine, at in places(graph).items()}

    def named(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name[one] for one in names)

    ops = (
        replace(op, name=other.name, nodes=other.nodes, reads=named(op.reads), writes=named(op.writes), source=other.source)
        for op, other in zip(graph.ops, like.ops, strict=True)
    )
    return replace(
        graph,
        ops=tuple(ops),
        values=tuple(replace(value, name=name[value.name]) for value in graph.values),
        inputs=named(graph.inputs),
        forward_outputs=named(graph.forward_outputs),
        backward_outputs=named(graph.backward_outputs),
    )


_GIVEN = {Kind.INPUT: "input", Kind.PARAM: "parameter", Kind.BUFFER: "buffer"}


def first_difference(planned: Graph, captured: Graph) -> str:
    """Where two graphs of unequal fingerprints differ first, in words.

    What a user knows of the call comes first: its inputs, autocast, the model's parameters and buffers, and how many of them
    get gradients. Then kernels and wiring, sizes, arguments.
    """
    said = _difference_of_inputs(planned, captured, Kind.INPUT) or _difference_of_casts(planned, captured)
    said = said or _difference_of_inputs(planned, captured, Kind.PARAM) or _difference_of_inputs(planned, captured, Kind.BUFFER)
    numbers = len(planned.backward_outputs), len(captured.backward_outputs)
    if not said and numbers[0] != numbers[1]:
        said = f"{numbers[0]} parameters and inputs get a gradient in the plan, {numbers[1]} in the model"
    return said or _difference_of_kernels(planned, captured)


def _difference_of_inputs(planned: Graph, captured: Graph, kind: Kind) -> str:
    """How the inputs of a kind differ, in number, or in dtype and shape."""
    ours, theirs = (
        [graph.value[name] for name in graph.inputs if graph.value[name].kind is kind] for graph in (planned, captured)
    )
    what = _GIVEN[kind]
    if len(ours) != len(theirs):
        return f"the plan has {len(ours)} {what}{'' if len(ours) == 1 else 's'}, the model {len(theirs)}"
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.form and other.form and one.form != other.form:
            return f"{what} {i} is {one.form} in the plan and {other.form} in the model"
    return ""


def _difference_of_casts(planned: Graph, captured: Graph) -> str:
    """One of the two was captured under autocast, or under autocast to another dtype."""
    ours, theirs = (
        {op.arguments.rpartition("dtype=")[2] for op in graph.ops[: graph.num_forward_ops] if op.kernel == _CAST}
        for graph in (planned, captured)
    )
    if ours == theirs:
        return ""
    texts = [f"casts to {', '.join(sorted(found))}" if found else "casts nothing" for found in (ours, theirs)]
    return f"the plan {texts[0]} and the model {texts[1]}: apply it under the autocast that it was made under"


def _difference_of_kernels(planned: Graph, captured: Graph) -> str:
    theirs_at = {place: name for name, place in places(captured).items()}
    place, place_there = places(planned), places(captured)
    for ours, theirs in zip(planned.ops, captured.ops, strict=False):
        where = f"op {ours.name} ({ours.source}) of the plan"
        if ours.kernel != theirs.kernel:
            kernels = f"{ours.kernel or 'unknown'}", f"{theirs.kernel or 'unknown'}"
            return f"{where} is {kernels[0]} where the model has {kernels[1]} ({theirs.name}, {theirs.source})"
        if [place[name] for name in ours.reads] != [place_there[name] for name in theirs.reads]:
            return f"{where} reads {_listed(ours.reads)} where the model's {theirs.name} reads {_listed(theirs.reads)}"
        if len(ours.writes) != len(theirs.writes):
            return f"{where} has {len(ours.writes)} results, the model's {theirs.name} {len(theirs.writes)}"
    if len(planned.ops) != len(captured.ops):
        return f"the plan has {len(planned.ops)} ops, the model {len(captured.ops)}"
    for name, at in place.items():
        if at in theirs_at and _known_bytes(planned, name) != (now := _known_bytes(captured, theirs_at[at])):
            return f"{name} has {_known_bytes(planned, name)} bytes in the plan and {now} in the model"
    for ours, theirs in zip(planned.ops, captured.ops, strict=True):
        if ours.arguments != theirs.arguments:
            one, other = _apart(ours.arguments, theirs.arguments)
            return f"op {ours.name} ({ours.source}), {ours.kernel}, is called with {one} in the plan and {other} in the model"
        if ours.recomputable != theirs.recomputable:
            says = [f"{'may' if op.recomputable else 'cannot'} run again" for op in (ours, theirs)]
            return f"op {ours.name} ({ours.source}) {says[0]} in the plan and {says[1]} in the model"
    return "their inputs or outputs differ"


def has_kernels(graph: Graph) -> bool:
    """Every op says which kernel it is: only then can the graph be compared with a captured one."""
    return all(op.kernel for op in graph.ops)


def _known_bytes(graph: Graph, name: str) -> int:
    """Bytes that follow from shapes: without those that were only seen when the kernel ran."""
    value = graph.value[name]
    return value.nbytes - value.hidden_bytes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two texts from a little before where they part."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, differ - _SHOWN // 2)
    dots = "..." if start else ""
    cut = [text[start : start + _SHOWN] + ("..." if len(text) > start + _SHOWN else "") for text in (one, other)]
    return f"{dots}{cut[0]}", f"{dots}{cut[1]}"
