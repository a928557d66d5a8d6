"""Nested containers, flattened and built again: torch.utils._pytree, which exported graphs are described by.

torch.Size is a leaf here. torch counts it among the containers, and builds a plain tuple in its place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._pytree import MappingKey, SequenceKey, keystr, register_pytree_node, tree_unflatten

__all__ = [
    "MappingKey",
    "SequenceKey",
    "children",
    "keystr",
    "register_pytree_node",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


tree_flatten = partial(_pytree.tree_flatten, is_leaf=_is_size)
tree_flatten_with_path = partial(_pytree.tree_flatten_with_path, is_leaf=_is_size)
tree_leaves = partial(_pytree.tree_leaves, is_leaf=_is_size)
tree_map = partial(_pytree.tree_map, is_leaf=_is_size)
tree_map_only = partial(_pytree.tree_map_only, is_leaf=_is_size)
tree_structure = partial(_pytree.tree_structure, is_leaf=_is_size)


def children(value: Any) -> list[Any] | None:
    """What a container directly holds; None of a leaf."""
    found: list[Any] = _pytree.tree_leaves(value, is_leaf=lambda part: part is not value or _is_size(part))
    return None if len(found) == 1 and found[0] is value else found
