"""BackwardKey: the gradients that a backward graph is right for: which outputs have one, with which strides.

Kernels, and their bits, depend on the strides of what they read. A gradient with other strides than the captured one must not
be copied into the captured layout: the bias gradient of a Linear, broadcast additions and batch norm would get other bits, and
captured views may not exist for it. So each backward graph holds for one key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.graph.graph import Kind
from planner.tracer.joint import Joint
from planner.tracer.replay import Strides

BackwardKey = tuple[Strides | None, ...]
"""Per result of the forward graph, the strides of its gradient; None where it has none. Its sizes are the result's."""

_ANY = -1
_MOST_DIMS_WITHOUT_MEMORY_FORMAT = 3


def backward_key(gradients: Sequence[torch.Tensor | None]) -> BackwardKey:
    """The key of these gradients."""
    return tuple([None if gradient is None else gradient.stride() for gradient in gradients])


def normal(key: BackwardKey, gradients: Sequence[torch.Tensor | None]) -> BackwardKey:
    """The key without strides that no kernel reads: of dimensions of size 1, and of tensors with at most one element.

    From four dimensions on they stay: kernels read them to tell channels-last tensors from contiguous ones.
    """
    return tuple(
        strides if gradient is None or strides is None else _normal(strides, gradient.shape)
        for strides, gradient in zip(key, gradients, strict=True)
    )


def _normal(strides: Strides, shape: Sequence[int]) -> Strides:
    single = len(shape) <= _MOST_DIMS_WITHOUT_MEMORY_FORMAT or all(size == 1 for size in shape) or 0 in shape
    if not single:
        return strides
    if 0 in shape:
        return (_ANY,) * len(shape)
    return tuple(_ANY if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def captured_key(joint: Joint) -> BackwardKey:
    """The key that a joint graph was captured for."""
    strides = {
        int(given.key): tuple(node.meta["val"].stride())
        for given, node in zip(joint.inputs, joint.graph.find_nodes(op="placeholder"), strict=True)
        if given.kind is Kind.TANGENT
    }
    return tuple(strides.get(i) for i in range(len(joint.results)))
