"""fx graphs as plain rows, for pickling: kernels by name, nodes by name, metadata left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._torch import OpOverload

Row = tuple[str, str, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class NodeName:
    """Stands for a node inside a row's arguments."""

    name: str


def to_rows(graph: fx.Graph) -> list[Row]:
    """(op, name, target, args, kwargs) per node, picklable."""
    rows = []
    for node in graph.nodes:
        args, kwargs = _map((node.args, node.kwargs), lambda arg: NodeName(arg.name))
        target = str(node.target) if isinstance(node.target, OpOverload) else node.target
        rows.append((node.op, node.name, target, args, kwargs))
    return rows


def from_rows(rows: list[Row]) -> fx.Graph:
    """The graph that `to_rows` was given, node names included."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in rows:
        if op == "output":
            graph.output(_resolve(args[0], nodes))
            continue
        kernel = _kernel(target) if op == "call_function" and isinstance(target, str) else target
        nodes[name] = graph.create_node(op, kernel, _resolve(args, nodes), _resolve(kwargs, nodes), name=name)
    return graph


def _map(args: Any, change: Any) -> Any:
    """fx.node.map_arg, which is typed for changes that give fx arguments again."""
    return fx.node.map_arg(args, change)


def _kernel(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _resolve(arg: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(arg, NodeName):
        return nodes[arg.name]
    if isinstance(arg, (tuple, list)):
        return type(arg)(_resolve(item, nodes) for item in arg)
    if isinstance(arg, dict):
        return {key: _resolve(item, nodes) for key, item in arg.items()}
    return arg
