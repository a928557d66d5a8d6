"""fx graphs as plain rows that can be pickled: kernels and nodes by name, and the metadata that a planned step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from planner._compat import pytree
from planner._compat.dispatch import OpOverload
from planner._compat.fake_tensors import fake_mode
from planner.rewriter.partition import ORIGIN

NodeRow = tuple[str, str, Any, Any, Any, str | None, Any]


@dataclass(frozen=True, slots=True)
class NodeName:
    """Stands for a node inside a row's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchName:
    """Stands for torch.NAME: memory formats cannot be pickled by the protocol that torch.save uses."""

    name: str


@dataclass(frozen=True, slots=True)
class FakeTensorSpec:
    """Stands for a fake tensor; which tensors share a storage is not recorded."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def to_rows(graph: fx.Graph, *, with_specs: bool) -> list[NodeRow]:
    """Per node (op, name, target, args, kwargs, origin, FakeTensorSpecs of its value), picklable.

    Args:
        with_specs: whether to include the FakeTensorSpecs, which inductor needs; else None.
    """
    rows = []
    for node in graph.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _named)
        target = str(node.target) if isinstance(node.target, OpOverload) else node.target
        spec = pytree.tree_map(_spec, node.meta.get("val")) if with_specs else None
        rows.append((node.op, node.name, target, args, kwargs, node.meta.get(ORIGIN), spec))
    return rows


def from_rows(rows: list[NodeRow]) -> fx.Graph:
    """The graph that `to_rows` was given, node names included."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    mode = fake_mode()
    for op, name, target, args, kwargs, origin, spec in rows:
        if op == "output":
            graph.output(_resolve(args[0], nodes))
            continue
        kernel = _kernel(target) if op == "call_function" and isinstance(target, str) else target
        nodes[name] = graph.create_node(op, kernel, _resolve(args, nodes), _resolve(kwargs, nodes), name=name)
        if origin is not None:
            nodes[name].meta[ORIGIN] = origin
        if spec is not None:
            with mode:
                nodes[name].meta["val"] = pytree.tree_map(_tensor, spec)
    return graph


def _spec(leaf: Any) -> Any:
    return FakeTensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, FakeTensorSpec):
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
