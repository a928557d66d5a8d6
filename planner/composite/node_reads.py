"""Which submodules' parts of autograd's graph code looks at (`tensor.grad_fn`).

A planned unit is one node where eager has one for each operation. Code that hooks, names or follows those would get others.
Autograd numbers nodes as they are made, so that the nodes of a submodule's call are those with the numbers of its time.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from planner._compat.backward_state import next_node_number, number_of_node
from planner._compat.tensors import is_dense, storage_id
from planner.tracer.host.callers import is_users
from planner.tracer.host.reads import ReadRecorder
from planner.tracer.host.tensor_patches import get_attribute, patched

_OF_NODE, _OF_STORAGE = frozenset({"grad_fn", "output_nr"}), frozenset({"_version", "_base", "_is_view"})
"""Attributes of tensors that depend on the operations which made them, or wrote into their memory."""


class NodeReads:
    """Notes, while entered, the nodes that code looks at, and for each call of a submodule the numbers of its nodes.

    Attributes:
        found: per submodule whose nodes code outside of it looks at, the attribute by which it does.
        follows: per submodule whose nodes code outside of it may come to from a node that it looks at (`next_functions`).
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.follows: dict[str, str] = {}
        self._running: list[tuple[str, int]] = []
        self._calls: list[tuple[str, int, int]] = []
        self._own: set[int] = set()
        self._storages: dict[int, set[str]] = {}

    @contextlib.contextmanager
    def noted(self, reads: ReadRecorder) -> Iterator[None]:
        """While entered, what users' code reads of tensors, and the nodes that it hooks, are noted."""

        def read(this: torch.Tensor, name: str, frame: types.FrameType) -> Any:
            if name in _OF_NODE and is_users(frame):
                self.see(get_attribute(this, "grad_fn"), name)
            elif name in _OF_STORAGE and is_users(frame) and is_dense(this):
                self._note(self._storages.get(storage_id(this), set()), self.found, name)
            return get_attribute(this, name)

        before, reads.on_hooked_node = reads.on_hooked_node, lambda node: self.see(node, "grad_fn")
        try:
            with patched(read, lambda this, name, frame: None):
                yield
        finally:
            reads.on_hooked_node = before

    def enter(self, name: str) -> None:
        """A submodule is called."""
        self._running.append((name, next_node_number()))

    def made(self, tensor: torch.Tensor) -> None:
        """The tensor's node is not the model's: it stands for the one behind it."""
        if tensor.grad_fn is not None:
            self._own.add(number_of_node(tensor.grad_fn))

    def returned(self, given: Iterable[Any], leaves: Iterable[Any]) -> None:
        """The submodule that was entered last, with these arguments, returns these."""
        name, first = self._running[-1]
        self._calls.append((name, first, next_node_number()))
        for leaf in (*given, *leaves):
            if isinstance(leaf, torch.Tensor) and is_dense(leaf):
                self._storages.setdefault(storage_id(leaf), set()).add(name)

    def see(self, node: Any, attribute: str) -> None:
        """Code looks at a node; None: at a tensor that has none."""
        while node is not None:
            number = number_of_node(node)
            self._note((name for name, first, end in self._calls if first <= number < end), self.found, attribute)
            self._note((name for name, first, _ in self._calls if first <= number), self.follows, attribute)
            node = node.next_functions[0][0] if number in self._own else None

    def leave(self) -> None:
        """It is left."""
        self._running.pop()

    def _note(self, names: Iterable[str], where: dict[str, str], attribute: str) -> None:
        running = {name for name, _ in self._running}
        where |= {name: attribute for name in names if name not in running}
