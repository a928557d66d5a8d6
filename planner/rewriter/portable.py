"""fx graphs as plain rows, for pickling: kernels and nodes by name; of the metadata, only where a node comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._torch import OpOverload
from planner.rewriter.partition import ORIGIN

Row = tuple[str, str, Any, Any, Any, str | None]


@dataclass(frozen=True, slots=True)
class NodeName:
    """Stands for a node inside a row's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchName:
    """Stands for torch.NAME: memory formats cannot be pickled by the protocol that torch.save uses."""

    name: str


def to_rows(graph: fx.Graph) -> list[Row]:
    """(op, name, target, args, kwargs, origin) per node, picklable."""
    rows = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _named)
        target = str(node.target) if isinstance(node.target, OpOverload) else node.target
        rows.append((node.op, node.name, target, args, kwargs, node.meta.get(ORIGIN)))
    return rows


def from_rows(rows: list[Row]) -> fx.Graph:
    """The graph that `to_rows` was given, node names included."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, origin in rows:
        if op == "output":
            graph.output(_resolve(args[0], nodes))
            continue
        kernel = _kernel(target) if op == "call_function" and isinstance(target, str) else target
        nodes[name] = graph.create_node(op, kernel, _resolve(args, nodes), _resolve(kwargs, nodes), name=name)
        if origin is not None:
            nodes[name].meta[ORIGIN] = origin
    return graph


def _named(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        return NodeName(arg.name)
    return TorchName(str(arg).removeprefix("torch.")) if isinstance(arg, torch.memory_format) else arg


def _kernel(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _resolve(arg: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(arg, NodeName):
        return nodes[arg.name]
    if isinstance(arg, TorchName):
        return getattr(torch, arg.name)
    if isinstance(arg, (tuple, list)):
        return type(arg)(_resolve(item, nodes) for item in arg)
    if isinstance(arg, dict):
        return {key: _resolve(item, nodes) for key, item in arg.items()}
    return arg
