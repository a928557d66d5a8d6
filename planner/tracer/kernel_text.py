"""What a kernel is called with, as text that names no node: equal for two captures of one step.

A tensor is written "%2.view([4, 8]).t():float32[8, 4]": the op's third read, the views between the storage and the argument,
its dtype and its shape. Strides and devices are left out: a plan may be made where the device is not, and for every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from planner._compat.dispatch import OpOverload
from planner.kernels import custom
from planner.kernels.calls import nested_text
from planner.tracer.storage import Storages

_LEFT_OUT = frozenset({"device", "pin_memory", "group_name"})
"""Arguments that say where a kernel runs and with which ranks, not what it computes."""


def kernel_name(target: Any) -> str:
    """The kernel that a node calls, as plan files name it: "aten.addmm.default", or one of this package's own functions."""
    if isinstance(target, OpOverload):
        return str(target)
    if target in custom.STORED_NAMES:
        return custom.STORED_NAMES[target]
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", type(target).__name__)
    home = str(getattr(target, "__module__", None) or "")
    return f"planner.{name}" if home.startswith("planner.") else f"{home}.{name}".lstrip(".")


def tensor_text(tensor: torch.Tensor) -> str:
    """The dtype and shape of a tensor: "float32[8, 4]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class CallTexts:
    """The texts of the calls of one joint graph."""

    def __init__(self, graph: fx.Graph, storages: Storages, saved_handles: Collection[str]) -> None:
        """`saved_handles`: storages whose sizes depend on the data, so that no shape is stated."""
        self._storages, self._saved_handles = storages, saved_handles
        self._views: dict[fx.Node, str] = {}
        for node in graph.nodes:  # in order, so that a view's base is there: chains may be longer than Python's stack
            self._views[node] = self._view(node)

    def arguments(self, node: fx.Node, reads: Sequence[str]) -> str:
        """What a kernel is called with, `reads` being the op's."""
        number = {name: i for i, name in enumerate(reads)}
        return _call(node, lambda arg: self._tensor(arg, number))

    def _tensor(self, node: fx.Node, number: Mapping[str, int]) -> str:
        root, val = self._storages.root.get(node, ""), node.meta.get("val")
        text = f"%{number.get(root, '')}{self._views[node]}"
        if root in self._saved_handles or not isinstance(val, torch.Tensor):
            return text
        return f"{text}:{tensor_text(val)}"

    def _view(self, node: fx.Node) -> str:
        """The views between a node's storage and the node; "" where the node holds it."""
        if node.op != "call_function" or node in self._storages.writes:
            return ""
        base = next((arg for arg in node.all_input_nodes), None)
        before = "" if base is None else self._views[base]
        if node.target is operator.getitem:
            holds = self._storages.root.get(node) == node.name
            return before if holds else f"{before}[{node.args[1]}]"
        name = kernel_name(node.target).removeprefix("aten.").removesuffix(".default")
        return f"{before}.{name}({_call(node, lambda arg: '' if arg is base else '%')})"


def _call(node: fx.Node, tensor: Callable[[fx.Node], str]) -> str:
    """A call's arguments, without those that are left out."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = [_text(arg, tensor) for i, arg in enumerate(node.args) if i >= len(names) or names[i] not in _LEFT_OUT]
    given += [f"{key}={_text(arg, tensor)}" for key, arg in sorted(node.kwargs.items()) if key not in _LEFT_OUT]
    return ", ".join(text for text in given if text)


def _text(arg: Any, tensor: Callable[[fx.Node], str]) -> str:
    if isinstance(arg, fx.Node):
        return tensor(arg)
    if isinstance(arg, torch.device):
        return ""
    if nested := nested_text(arg, lambda item: _text(item, tensor)):
        return nested
    if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)):
        return str(arg).removeprefix("torch.")
    if arg is None or isinstance(arg, (bool, int, float, complex, str)):
        return repr(arg)
    return kernel_name(arg) if callable(arg) else type(arg).__name__  # a repr would hold an address
