"""fx graphs as plain rows, for pickling: kernels and nodes by name; of the metadata, what a planned step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import OpOverload
from planner._compat.fake_tensors import fake_mode
from planner.rewriter.partition import ORIGIN

Row = tuple[str, str, Any, Any, Any, str | None, Any]


@dataclass(frozen=True, slots=True)
class NodeName:
    """Stands for a node inside a row's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchName:
    """Stands for torch.NAME: memory formats cannot be pickled by the protocol that torch.save uses."""

    name: str


@dataclass(frozen=True, slots=True)
class Look:
    """Stands for a fake tensor: all there is to it but the sharing of storages."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def to_rows(graph: fx.Graph, *, looks: bool) -> list[Row]:
    """(op, name, target, args, kwargs, origin, what its value looks like) per node, picklable; the last if `looks`."""
    rows = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _named)
        target = str(node.target) if isinstance(node.target, OpOverload) else node.target
        look = pytree.tree_map(_look, node.meta.get("val")) if looks else None
        rows.append((node.op, node.name, target, args, kwargs, node.meta.get(ORIGIN), look))
    return rows


def from_rows(rows: list[Row]) -> fx.Graph:
    """The graph that `to_rows` was given, node names included."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    mode = fake_mode()
    for op, name, target, args, kwargs, origin, look in rows:
        if op == "output":
            graph.output(_resolve(args[0], nodes))
            continue
        kernel = _kernel(target) if op == "call_function" and isinstance(target, str) else target
        nodes[name] = graph.create_node(op, kernel, _resolve(args, nodes), _resolve(kwargs, nodes), name=name)
        if origin is not None:
            nodes[name].meta[ORIGIN] = origin
        if look is not None:
            with mode:
                nodes[name].meta["val"] = pytree.tree_map(_tensor, look)
    return graph


def _look(leaf: Any) -> Any:
    return Look(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, Look):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device)


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
