"""Kernels that return nothing and may raise: torch.linalg's error checks, torch._assert_async.

Traced as it is, such a kernel would be dropped as dead code, or become an effect that no plan can hold. While tracing, it is
replaced by a substitute with a result of no bytes; in normal form it is the kernel again, and runs once, never in a recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from planner._compat.backward_state import in_backward
from planner._compat.dispatch import OpOverload

aten = torch.ops.aten
_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definition
_LIBRARY.define("raising(Tensor read, str kernel, str text, bool flag, bool backward) -> Tensor")
_LINALG, _ASSERT, _ASSERT_TEXT = (
    aten._linalg_check_errors.default,
    aten._assert_async.default,
    aten._assert_async.msg,
)
_KERNELS: Mapping[str, OpOverload] = {str(kernel): kernel for kernel in (_LINALG, _ASSERT, _ASSERT_TEXT)}


@torch.library.register_fake("checkpoint_planner::raising", lib=_LIBRARY)
def _fake_raising(read: torch.Tensor, kernel: str, text: str, flag: bool, backward: bool) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=read.device)


_SUBSTITUTE = torch.ops.checkpoint_planner.raising.default
fx.node.has_side_effect(_SUBSTITUTE)


def substitutes() -> Mapping[OpOverload, Callable[..., Any]]:
    """What replaces the kernels while a step is traced."""

    def linalg(info: torch.Tensor, api_name: str, *, is_matrix: bool) -> None:
        _note(_LINALG, info, api_name, is_matrix)

    def asserted(condition: torch.Tensor) -> None:
        _note(_ASSERT, condition)

    def asserted_text(condition: torch.Tensor, assert_msg: str) -> None:
        _note(_ASSERT_TEXT, condition, assert_msg)

    return {_LINALG: linalg, _ASSERT: asserted, _ASSERT_TEXT: asserted_text}


def _note(kernel: OpOverload, read: torch.Tensor, text: str = "", flag: bool = False) -> None:
    _SUBSTITUTE(read.detach(), str(kernel), text, flag, in_backward())


def in_forward(graph: fx.Graph) -> list[fx.Node]:
    """The substitutes that eager's forward ran: the forward ends after them."""
    return [node for node in graph.find_nodes(op="call_function", target=_SUBSTITUTE) if not node.args[4]]


def write_raising(graph: fx.Graph) -> None:
    """Turn the substitutes into their kernels. Their value stays an empty tensor, which is not read."""
    for node in graph.find_nodes(op="call_function", target=_SUBSTITUTE):
        read, kernel, text, flag, _ = node.args
        node.target = _KERNELS[str(kernel)]
        node.args = (read, text) if node.target in (_LINALG, _ASSERT_TEXT) else (read,)
        node.kwargs = {"is_matrix": flag} if node.target is _LINALG else {}


def raises(node: fx.Node) -> bool:
    """The kernel is run for the error that it may raise."""
    return node.target is _SUBSTITUTE or node.target in _KERNELS.values()
