"""A rewritten graph as statements: one per kernel, with the views of its arguments and of its result nested inside.

A view takes no memory, so it may be written anywhere between the kernel that makes its storage and its use. A view that is the
only reader of a kernel's result is written around the kernel, a view with one reader inside the reader.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from planner.graph.source import NOWHERE, Source
from planner.rewriter.partition import ORIGIN


@dataclass(frozen=True, slots=True)
class Line:
    """One statement.

    Attributes:
        root: the node whose value it makes; kernel and views may be nested inside.
        kernel: the kernel among them; a view's own node where there is none.
        results: the tensors of a tuple result, by position, None where one is not read; (root,) for a single tensor.
        reads: the values it needs, in order of appearance, as often as they appear.
        module: path of the module it comes from.
        source: where in the user's code its kernel comes from.
        again: a recompute.
    """

    root: fx.Node
    kernel: fx.Node
    results: tuple[fx.Node | None, ...]
    reads: tuple[fx.Node, ...]
    module: str
    source: Source
    again: bool

    @property
    def made(self) -> tuple[fx.Node, ...]:
        """The results that are read or returned."""
        return tuple(node for node in self.results if node is not None)


@dataclass(frozen=True, slots=True)
class WrittenPass:
    """A forward or backward pass as statements, with the values it takes and returns.

    Attributes:
        lines: in order of execution.
        outside: placeholder -> ("w", tensor's name), ("kept", key) or ("output gradient", name).
        stored: value -> ("kept", key) or ("grads", name), where it is stored as soon as it is computed.
        returned: the values returned at the end.
        same: getitem -> the first getitem of the same result.
        last_read: value -> the last line that reads it; `len(lines)` where it is returned.
        made_at: value -> the line that makes it.
    """

    lines: tuple[Line, ...]
    outside: Mapping[fx.Node, tuple[str, str]]
    returned: tuple[fx.Node, ...]
    same: Mapping[fx.Node, fx.Node]
    stored: Mapping[fx.Node, tuple[str, str]] = field(default_factory=dict)
    last_read: Mapping[fx.Node, int] = field(init=False)
    made_at: Mapping[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        read = {node: i for i, line in enumerate(self.lines) for node in line.reads}
        read |= dict.fromkeys(self.returned, len(self.lines))
        object.__setattr__(self, "last_read", read)
        object.__setattr__(self, "made_at", {node: i for i, line in enumerate(self.lines) for node in line.made})

    def place(self, node: fx.Node) -> tuple[Line, int]:
        """The line that makes a value, and the position among its results."""
        node = self.same.get(node, node)
        line = self.lines[self.made_at[node]]
        return line, line.results.index(node)

    def storing(self, stored: Mapping[fx.Node, tuple[str, str]]) -> WrittenPass:
        """The same pass with `stored` set."""
        return replace(self, stored={self.same.get(node, node): place for node, place in stored.items()})


def origin(node: fx.Node) -> str:
    """Name of the joint graph's node that a rewritten node was written for."""
    return str(node.meta.get(ORIGIN, node.name))


def write_pass(
    graph: fx.Graph,
    kernels: Collection[str],
    sources: Mapping[str, Source],
    ran: set[str],
    outside: Mapping[fx.Node, tuple[str, str]],
    returned: Sequence[fx.Node],
) -> WrittenPass:
    """The statements of a rewritten graph.

    Args:
        graph: of the pass.
        kernels: names of the joint graph's nodes that make storages; the others are views.
        sources: by joint node.
        ran: names of joint nodes that have run; this pass's are added.
        outside, returned: see WrittenPass.
    """
    nested, carried = _nest(graph, kernels, {node for node, (kind, _) in outside.items() if kind == "w"})
    order = {node: i for i, node in enumerate(graph.nodes)}
    items: dict[fx.Node, dict[int, fx.Node]] = {}
    same: dict[fx.Node, fx.Node] = {}
    for item in filter(_is_getitem, graph.nodes):
        whole, position = item.args
        same[item] = items.setdefault(whole, {}).setdefault(position, item)
    roots = [node for node in graph.nodes if node.op == "call_function" and node not in nested and not _is_getitem(node)]
    lines: list[Line] = []
    module = ""
    for root in sorted(roots, key=lambda node: order[carried.get(node, node)]):
        kernel = carried.get(root, root)
        source = sources.get(origin(kernel), NOWHERE)
        if source:  # a sum of gradients has none: it gets the module of the line before
            module = source.module
        taken = items.get(root, {})
        results = tuple(taken.get(i) for i in range(max(taken) + 1)) if taken else (root,)
        reads = tuple(same.get(node, node) for node in _leaves(root, nested))
        again = root in carried and origin(kernel) in ran
        if root in carried:
            ran.add(origin(kernel))
        lines.append(Line(root, kernel, results, reads, module, source, again))
    return WrittenPass(tuple(lines), outside, tuple(same.get(node, node) for node in returned), same)


def _nest(graph: fx.Graph, kernels: Collection[str], resident: set[fx.Node]) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """(Nodes to write inside their readers, node -> the kernel that its statement runs; a view alone runs none).

    A view of a `resident` tensor is written wherever it is read, because it keeps nothing alive.
    """
    nested: set[fx.Node] = set()
    carried: dict[fx.Node, fx.Node] = {}
    free = set(resident)

    def is_view(node: fx.Node) -> bool:
        return node.op == "call_function" and not _is_getitem(node) and origin(node) not in kernels

    for node in graph.nodes:
        if node.op != "call_function" or _is_getitem(node):
            continue
        inside = (carried[arg] for arg in node.all_input_nodes if arg in nested and arg in carried)
        kernel = next(inside, None) if is_view(node) else node
        if kernel is not None:
            carried[node] = kernel
        if not all(reader.op == "call_function" and not _is_getitem(reader) for reader in node.users):
            continue
        if is_view(node) and free.issuperset(node.all_input_nodes):
            free.add(node)
            nested.add(node)
        elif len(node.users) == 1 and (node not in carried or is_view(*node.users)):
            nested.add(node)
    return nested, carried


def _leaves(node: fx.Node, nested: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The values that a statement reads, in order of appearance."""
    arguments: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), arguments.append)  # type: ignore[arg-type]
    for arg in arguments:
        if arg in nested:
            yield from _leaves(arg, nested)
        else:
            yield arg


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
