"""What autograd's engine says about the backward that runs now, and about the order in which nodes were made."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._autograd import _get_current_graph_task_keep_graph, _get_sequence_nr


def backward_id() -> int:
    """A number of the backward that autograd's engine runs in this thread; -1 where it runs none."""
    return int(torch._C._current_graph_task_id())


def in_backward() -> bool:
    """Autograd's engine is running a backward in this thread."""
    return backward_id() != -1


def number_of_node(node: Any) -> int:
    """The number that autograd gave a node of its graph when it was made; of nodes of leaves, one above all others."""
    return int(node._sequence_nr())


def next_node_number() -> int:
    """The number of the node that this thread makes next."""
    return int(_get_sequence_nr())


KEEPS_GRAPH_IMPORT = "from torch._C._autograd import _get_current_graph_task_keep_graph"
"""What `keeps_graph` needs where its source is written into an exported file."""


def keeps_graph() -> bool:
    """The backward that runs now was told to keep its graph (retain_graph=True)."""
    return bool(_get_current_graph_task_keep_graph())


def release_saved(ctx: Any) -> list[torch.Tensor]:
    """Take the saved tensors off an autograd context; unless the graph is retained, it forgets them."""
    saved = list(ctx.saved_tensors)
    if not keeps_graph():
        ctx.maybe_clear_saved_tensors()
    return saved
