"""Which storage a node's tensor lives in: a view has that of its base."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import OpOverload
from planner._compat.tensors import storage_id


class Storages:
    """Storages of a joint graph, named after the node that first holds them.

    Attributes:
        root: tensor node -> name of its storage. A kernel with several outputs has none itself; its
            getitems do.
        writes: kernel node -> (name, bytes) of the storages it makes; views and getitems are missing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.root: dict[fx.Node, str] = {}
        self.writes: dict[fx.Node, tuple[tuple[str, int], ...]] = {}
        self._owner: dict[int, str] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                # the same tensor may come in twice (labels=input_ids): one storage
                self.root[node] = self._owner.setdefault(storage_id(node.meta["val"]), node.name)
            elif node.op == "call_function":
                self._add(node)

    def is_view(self, node: fx.Node) -> bool:
        """The node makes no storage and only returns a view of one: it costs nothing and can be made again."""
        return node.op == "call_function" and node not in self.writes

    def _add(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if node.target is operator.getitem:
            if isinstance(val, torch.Tensor):
                self.root[node] = self._owner[storage_id(val)]
            return
        made: list[tuple[str, int]] = []
        is_view = False
        for i, tensor in enumerate((val,) if isinstance(val, torch.Tensor) else pytree.tree_leaves(val)):
            if not isinstance(tensor, torch.Tensor):
                continue
            key = storage_id(tensor)
            if key in self._owner:
                is_view = True
                continue
            name = node.name if isinstance(val, torch.Tensor) else _item_name(node, i)
            self._owner[key] = name
            made.append((name, tensor.untyped_storage().nbytes()))
        if isinstance(val, torch.Tensor):
            self.root[node] = self._owner[storage_id(val)]
        if made or not is_view or mutates(node):
            self.writes[node] = tuple(made)


def items(node: fx.Node) -> Iterator[fx.Node]:
    """The getitem nodes of a kernel with several outputs."""
    return (user for user in node.users if user.target is operator.getitem)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they depend on."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def mutates(node: fx.Node) -> bool:
    """The kernel writes into one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _item_name(node: fx.Node, position: int) -> str:
    return next((item.name for item in items(node) if item.args[1] == position), f"{node.name}.{position}")
