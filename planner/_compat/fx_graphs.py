"""What torch.fx does not say of its graphs in public names."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.graph import _BoxedCodeGen

IS_GRADIENT_SUM = "is_gradient_acc"
"""Metadata that torch's tracer leaves on additions of the autograd engine itself. Without it no gradient counts as one."""


def results(graph: fx.Graph) -> tuple[Any, ...]:
    """The nodes (or None) that a graph returns."""
    handed: Any = graph.output_node().args[0]
    return tuple(handed)


def box(graph: fx.Graph) -> None:
    """Make the graph's code take one list and empty it, so that inputs can be freed midway."""
    graph.set_codegen(_BoxedCodeGen())
