"""What the trace notes on the kernels it records, read back into tables keyed by node.

torch copies `meta["custom"]` from a forward node to its backward nodes (torch.fx.traceback.annotate): only by that is it
known where a backward kernel comes from. The marks are removed from the nodes as soon as the graph is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from planner.graph.source import Source

_SOURCE, _CAST = "planner_source", "planner_cast"


def marks(source: Source, cast_context: int | None) -> dict[str, Any]:
    """For `torch.fx.traceback.annotate`.

    Args:
        source: where the kernel is called.
        cast_context: for a cast by autocast, the number of the context in which eager would cache it.
    """
    return {_SOURCE: source} if cast_context is None else {_SOURCE: source, _CAST: cast_context}


def marks_of_copy(custom: Mapping[str, Any], module: str, copied_for: str, later_context: int) -> dict[str, Any]:
    """What a copy of a node has in `meta["custom"]`.

    Args:
        module, copied_for: the submodule whose node it is, and the one that it is copied for.
        later_context: number of the context of the copy's casts, beyond that of the node's.
    """
    found = dict(custom)
    source = found.get(_SOURCE)
    if source is not None and f"{source.module}.".startswith(f"{module}."):
        found[_SOURCE] = replace(source, module=copied_for + source.module[len(module) :])
    if _CAST in found:
        found[_CAST] += later_context
    return found


def take_marks(graph: fx.Graph) -> tuple[dict[fx.Node, Source], dict[fx.Node, int]]:
    """(source, cast context) by node, for the nodes that have one; the marks are removed from the nodes."""
    sources: dict[fx.Node, Source] = {}
    casts: dict[fx.Node, int] = {}
    for node in graph.nodes:
        custom = dict(node.meta.get("custom") or {})
        source, cast = custom.pop(_SOURCE, None), custom.pop(_CAST, None)
        if source is not None:
            sources[node] = source
            node.meta["custom"] = custom
        if cast is not None:
            casts[node] = cast
    return sources, casts
