"""A half of a planned step compiled by inductor, in pieces.

Between two kernels that have to run as they are (random draws, which take their numbers in eager's order from torch's own
generator; opaque parts; what returns no tensors) lies a piece that is compiled. What is kept and what is recomputed stays as
planned: no piece reaches from the forward into the backward. Inside a piece, fused kernels leave out values that the plan
counts, and round differently from eager's kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import OpOverload
from planner._compat.fx_graphs import box, results
from planner._compat.inductor import compile_boxed
from planner.errors import CompileError
from planner.kernels import custom
from planner.kernels.facts import is_random
from planner.tracer.faults import is_out_of_memory
from planner.tracer.storage import mutates

Boxed = Callable[[list[Any]], Sequence[Any]]

_OF_TENSORS = (custom.laid_out, custom.noise)
"""Functions of ours that are nothing but ATen kernels."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive nodes of a graph that run as one call.

    Attributes:
        is_compiled: whether it is to be compiled; else it is one node, and those that take its results apart.
    """

    is_compiled: bool
    nodes: list[fx.Node]

    @property
    def reads(self) -> list[fx.Node]:
        """What it takes from before, each once."""
        mine = set(self.nodes)
        return list(dict.fromkeys(arg for node in self.nodes for arg in node.all_input_nodes if arg not in mine))


@dataclass(frozen=True, slots=True)
class _Call:
    """A piece ready to run.

    Attributes:
        run: boxed; what the piece reads -> what it writes.
        reads: nodes whose values it takes.
        dead: those of them that nothing reads later.
        writes: nodes whose values it makes for later.
    """

    run: Boxed
    reads: list[fx.Node]
    dead: list[fx.Node]
    writes: list[fx.Node]


class Compiled:
    """A graph as inductor runs it: call it with a list of the inputs, which it empties to free each after its last use.

    Args:
        graph: every node carries its fake value in `meta["val"]`; one that does not runs as it is, with what reads it.

    Raises:
        CompileError: inductor, or the compiler behind it, cannot; says what it said.

    Attributes:
        num_compiled: how many pieces inductor compiled.
    """

    def __init__(self, graph: fx.Graph) -> None:
        pieces = _pieces(graph)
        self._inputs = list(graph.find_nodes(op="placeholder"))
        self._results = results(graph)
        last_read = {node: k for k, piece in enumerate(pieces) for node in piece.reads}
        last_read |= dict.fromkeys(self._results, len(pieces))
        self._unread = [node for node in self._inputs if node not in last_read]
        self._written = set(_written(graph))
        self._calls = []
        for k, piece in enumerate(pieces):
            writes = [node for node in piece.nodes if last_read.get(node, -1) > k]
            run = _compile(piece, writes) if piece.is_compiled else _as_is(piece, writes)
            self._calls.append(_Call(run, piece.reads, [node for node in piece.reads if last_read[node] == k], writes))
        self.num_compiled = sum(piece.is_compiled for piece in pieces)

    def __call__(self, given: list[Any]) -> tuple[Any, ...]:
        """The graph's results."""
        now = {node: self._as_compiled(node, value) for node, value in zip(self._inputs, given, strict=True)}
        given.clear()
        for node in self._unread:
            del now[node]
        for call in self._calls:
            values = [now[node] for node in call.reads]
            for node in call.dead:
                del now[node]
            now.update(zip(call.writes, call.run(values), strict=True))
        return tuple(None if node is None else now[node] for node in self._results)

    def _as_compiled(self, node: fx.Node, value: Any) -> Any:
        """An input with the strides that the code was made for: a gradient from outside may have any."""
        like = node.meta.get("val")
        if not isinstance(like, torch.Tensor) or not isinstance(value, torch.Tensor) or _same_layout(value, like):
            return value
        if node in self._written:
            raise CompileError(f"{node.name} was laid out otherwise when the step was compiled: {like.stride()}. Plan again")
        return custom.laid_out(value, like.shape, like.stride())


def _same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Strides are equal where a dimension has more than one entry."""
    if one.stride() == other.stride():
        return True
    sizes = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size <= 1 or mine == theirs for size, mine, theirs in sizes)


def _written(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes whose tensors kernels write into, by their schemas."""
    for node in graph.nodes:
        if mutates(node):
            for arg, argument in zip(node.args, node.target._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(arg, fx.Node):
                    yield arg


def _compile(piece: _Piece, writes: Sequence[fx.Node]) -> Boxed:
    try:
        return compile_boxed(_graph_of(piece, writes), [node.meta["val"] for node in piece.reads])
    except Exception as error:  # of any kind: what inductor and a C++ compiler raise has no common base
        if is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise CompileError(
            f"inductor cannot compile the planned step between {piece.nodes[0].name} and {piece.nodes[-1].name}: "
            f"{type(error).__name__}: {said}. Plan without compile=True: the step then runs kernel by kernel"
        ) from error


def _as_is(piece: _Piece, writes: Sequence[fx.Node]) -> Boxed:
    """Run kernel by kernel, as fx's own code does."""
    graph = _graph_of(piece, writes)
    box(graph)
    return fx.GraphModule({}, graph).forward  # type: ignore[no-any-return]


def _graph_of(piece: _Piece, writes: Iterable[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    now = {node: graph.placeholder(node.name) for node in piece.reads}
    for node in piece.nodes:
        now[node] = graph.node_copy(node, now.__getitem__)
    graph.output(tuple(now[node] for node in writes))
    return graph


def _pieces(graph: fx.Graph) -> list[_Piece]:
    """The graph's calls in pieces, in their order; a kernel's results are taken apart in its own piece."""
    pieces: list[_Piece] = []
    home: dict[fx.Node, _Piece] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and node.args[0] in home:
            home[node] = home[node.args[0]]
            home[node].nodes.append(node)
            continue
        compiled = _can_be_compiled(node)
        if not (compiled and pieces and pieces[-1].is_compiled):
            pieces.append(_Piece(compiled, []))
        home[node] = pieces[-1]
        pieces[-1].nodes.append(node)
    return pieces


def _can_be_compiled(node: fx.Node) -> bool:
    """A kernel of tensors only, that draws no random numbers."""
    if is_random(node) or not (isinstance(node.target, OpOverload) or node.target in _OF_TENSORS):
        return False
    return all(
        isinstance(leaf, torch.Tensor | None)
        for held in (node, *node.all_input_nodes)
        for leaf in pytree.tree_leaves(held.meta.get("val"))
    )
