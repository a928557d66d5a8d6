"""Facts about a kernel from its name, its schema and its observed run: is it random, repeatable, a collective?"""

from __future__ import annotations

import torch
from torch import fx

from planner.kernels import custom, observed
from planner.kernels.observed import observation_of

Operator = type(torch.ops.aten.add.Tensor)
"""The class of ATen's operators, which has no public name."""
COLLECTIVE_NAMESPACES = frozenset(
    {"_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor"}
)
"""Of operators that communicate with other processes."""

_INERT = {"dropout_p": 0.0, "p": 0.0, "train": False}
"""Arguments at which a kernel that can draw random numbers draws none."""

_CONVOLUTIONS = (
    *("convolution", "convolution_backward", "convolution_overrideable", "convolution_backward_overrideable", "_convolution"),
    *("_conv_depthwise2d", "conv_depthwise3d", "conv_tbc", "_slow_conv2d_forward", "_slow_conv2d_backward"),
    *("slow_conv3d_forward", "slow_conv_dilated2d", "slow_conv_dilated3d", "slow_conv_transpose2d", "slow_conv_transpose3d"),
    *("mkldnn_convolution", "_nnpack_spatial_convolution", "_mps_convolution", "_mps_convolution_transpose"),
    *("mps_convolution_backward", "mps_convolution_transpose_backward", "cudnn_convolution", "cudnn_convolution_transpose"),
    *("cudnn_convolution_relu", "cudnn_convolution_add_relu", "miopen_convolution", "miopen_convolution_transpose"),
    *("miopen_convolution_relu", "miopen_convolution_add_relu", "miopen_depthwise_convolution"),
)
_RECURRENT = (
    *(
        "mkldnn_rnn_layer",
        "mkldnn_rnn_layer_backward",
        "_cudnn_rnn",
        "_cudnn_rnn_backward",
        "miopen_rnn",
        "miopen_rnn_backward",
    ),
    *("_lstm_mps", "lstm_mps_backward", "quantized_lstm", "quantized_gru", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"),
    *("_thnn_fused_lstm_cell_backward_impl", "_thnn_fused_gru_cell_backward"),
)
_HOLDING_MUCH = frozenset(f"aten::{name}" for name in (*_CONVOLUTIONS, *_RECURRENT))
"""Operators whose kernels may hold as much for themselves while they run as their tensors take: others are made of these."""


def may_hold_much(operator: object) -> bool:
    """While it runs, the operator's kernel may hold as much for itself as its tensors take.

    That is what is known of torch's. Of those of other libraries, nothing is.
    """
    if not isinstance(operator, Operator):
        return False
    return observed.is_foreign(operator) or operator._schema.name in _HOLDING_MUCH


def is_random(node: fx.Node) -> bool:
    """The node's kernel draws from the default generator. For opaque modules see `planner.tracer.opaque.call.draws`."""
    if node.target is custom.bernoulli:
        return True
    found = observation_of(node) if observed.is_foreign(node.target) else None
    if found is not None and found.draws:
        return True
    if not isinstance(node.target, Operator) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {
        **{a.name: a.default_value for a in node.target._schema.arguments},
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    return not any(name in given and given[name] == inert and given[name] is not None for name, inert in _INERT.items())


def is_repeatable(node: fx.Node) -> bool:
    """With the generator in the same state a second run gives the same bits: torch's kernels, and others as observed."""
    if not isinstance(node.target, Operator) or not observed.is_foreign(node.target):
        return True
    found = observation_of(node)
    return found is not None and found.repeatable


def is_collective(node: fx.Node) -> bool:
    """The kernel communicates with other ranks, or waits for the result of one that does."""
    if getattr(node.target, "namespace", "") in COLLECTIVE_NAMESPACES:
        return True
    found = observation_of(node)
    return found is not None and found.communicates
