"""Nested containers, flattened and built again: torch.utils._pytree, which exported graphs are described by."""

from collections.abc import Iterable
from typing import Any

from torch.utils._pytree import (
    MappingKey,
    SequenceKey,
    keystr,
    register_pytree_node,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)

__all__ = [
    "MappingKey",
    "SequenceKey",
    "keystr",
    "like",
    "register_pytree_node",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]


def like(value: Any, items: Iterable[Any]) -> Any:
    """A list or tuple of the same class, with other items; a namedtuple's class takes them one by one."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
