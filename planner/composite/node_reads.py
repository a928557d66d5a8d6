"""Which nodes of autograd's graph code looks at (`tensor.grad_fn`), and which submodules' they are.

A planned unit is one node where eager has one for each operation. Code that hooks, names or follows those would get others.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from planner._compat import pytree
from planner.tracer.host.callers import is_users
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.host.tensor_patches import get_attribute, patched

Node = torch.autograd.graph.Node
_OF_GRAPH = frozenset({"grad_fn", "output_nr", "_version", "_base", "_is_view"})
"""Attributes of tensors that depend on the operations which made them, not on the result alone."""


class NodeReads:
    """Notes, while entered, the nodes that code looks at, and for each call of a submodule where its part of the graph is.

    Attributes:
        has_seen: code looked at one.
    """

    def __init__(self) -> None:
        self._running: list[tuple[str, frozenset[Node]]] = []
        self._calls: list[tuple[str, frozenset[Node], frozenset[Node]]] = []
        self._seen: list[tuple[Node, str, frozenset[str]]] = []
        self.has_seen = False

    @contextlib.contextmanager
    def noted(self, reads: ReadRecorder) -> Iterator[None]:
        """While entered, what users' code reads as `grad_fn`, and the nodes that it hooks, are noted."""

        def read(this: torch.Tensor, name: str, frame: types.FrameType) -> Any:
            node = get_attribute(this, "grad_fn") if name in _OF_GRAPH and is_users(frame) else None
            if node is not None:
                self._see(node, name)
            return get_attribute(this, name)

        before, reads.on_hooked_node = reads.on_hooked_node, lambda node: self._see(node, "grad_fn")
        try:
            with patched(read, lambda this, name, frame: None):
                yield
        finally:
            reads.on_hooked_node = before

    def enter(self, name: str, given: Any) -> None:
        """A submodule is called with these arguments."""
        self._running.append((name, _nodes_of(pytree.tree_leaves(given))))

    def returned(self, name: str, leaves: Iterable[Any]) -> None:
        """The submodule that was entered last returns these."""
        self._calls.append((name, _nodes_of(leaves), self._running[-1][1]))

    def leave(self) -> None:
        """It is left."""
        self._running.pop()

    def close(self) -> None:
        """The step is over: graphs are not kept alive."""
        self._calls.clear()
        self._seen.clear()

    def inside_of(self, *, follows: bool) -> dict[str, str]:
        """The submodules whose nodes code outside of them looks at, and by which attribute of a tensor.

        Args:
            follows: code goes from a node to those behind it (`next_functions`).
        """
        found: dict[str, str] = {}
        for node, attribute, running in self._seen:
            looked_at = _behind([node]) if follows else {node}
            for name, last, first in self._calls:
                if name not in running and looked_at & _behind(last, stops_at=first):
                    found[name] = attribute
        return found

    def _see(self, node: Node, attribute: str) -> None:
        self.has_seen = True
        self._seen.append((node, attribute, frozenset(name for name, _ in self._running)))


def _nodes_of(leaves: Iterable[Any]) -> frozenset[Node]:
    return frozenset(leaf.grad_fn for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None)


def _behind(nodes: Iterable[Node], stops_at: Collection[Node] = ()) -> set[Node]:
    """These nodes, and all that lead to them in the forward, up to and without some."""
    found: set[Node] = set()
    todo = [node for node in nodes if node not in stops_at]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions if following is not None and following not in stops_at]
    return found
