"""Where batch norm's kernels take and return their running statistics: one table for all of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """One of batch norm's kernels. Arguments 3 and 4 of each are the running mean and variance.

    Attributes:
        training: position of the argument that says whether the statistics are those of the batch.
        is_backward: in training mode, it is given the running statistics and does not read them.
        writes_in_place: in training mode it updates the running statistics, though its schema does not say so.
        returns_statistics: results 3 and 4 are the updated running statistics; its other results do not depend on the old ones.
    """

    training: int
    is_backward: bool = False
    writes_in_place: bool = False
    returns_statistics: bool = False


KERNELS: dict[Any, BatchNorm] = {
    aten._native_batch_norm_legit_functional.default: BatchNorm(training=5, returns_statistics=True),
    aten.native_batch_norm.default: BatchNorm(training=5, writes_in_place=True),
    aten.cudnn_batch_norm.default: BatchNorm(training=5, writes_in_place=True),
    aten.miopen_batch_norm.default: BatchNorm(training=5, writes_in_place=True),
    aten.native_batch_norm_backward.default: BatchNorm(training=7, is_backward=True),
}
_STATISTICS = slice(3, 5)
_RETURNED = (3, 4)


def training_kernel(node: fx.Node) -> BatchNorm | None:
    """The row of a batch norm in training mode; None for any other node."""
    kernel = KERNELS.get(node.target)
    return kernel if kernel is not None and node.args[kernel.training] is True else None


def statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running mean and variance that a batch norm is given, where it is given them."""
    return tuple(arg for arg in node.args[_STATISTICS] if isinstance(arg, fx.Node))


def updates_statistics(node: fx.Node) -> bool:
    """A forward kernel that writes into its running statistics without saying so in its schema."""
    kernel = training_kernel(node)
    return kernel is not None and kernel.writes_in_place


def written_statistics(func: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    """Of a kernel's call, the running statistics that it writes without saying so in its schema."""
    kernel = KERNELS.get(func)
    if kernel is None or not kernel.writes_in_place or args[kernel.training] is not True:
        return []
    return [arg for arg in args[_STATISTICS] if isinstance(arg, torch.Tensor)]


def unread_in_recompute(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of a forward kernel whose values may have changed when it runs again: its other results ignore them."""
    kernel = training_kernel(node)
    return statistics(node) if kernel is not None and not kernel.is_backward else ()


def unread_in_backward(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of a backward kernel that it is given and does not read."""
    kernel = training_kernel(node)
    return statistics(node) if kernel is not None and kernel.is_backward else ()


def new_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The results of a forward kernel that are the updated running statistics, where it returns them."""
    kernel = KERNELS.get(node.target)
    if kernel is None or not kernel.returns_statistics:
        return ()
    return tuple(user for user in node.users if user.target is operator.getitem and user.args[1] in _RETURNED)


def source_of_statistic(item: Any) -> fx.Node | None:
    """The kernel in training mode whose updated running mean or variance `item` is; None for any other value."""
    kernel = item.args[0] if isinstance(item, fx.Node) and item.args else None
    if not isinstance(kernel, fx.Node):
        return None
    row = training_kernel(kernel)
    return kernel if row is not None and row.returns_statistics else None


def with_statistics(node: fx.Node, mean: Any, variance: Any) -> tuple[Any, ...]:
    """The node's arguments with these running statistics."""
    return (*node.args[: _STATISTICS.start], mean, variance, *node.args[_STATISTICS.stop :])
