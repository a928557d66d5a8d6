"""Capture of a call that was captured before, for gradients of other outputs or in other layouts.

The traced identity at each output (`planner.tracer.results`) passes its gradient through `incoming_gradient`, a kernel that
exists in the trace only: its fake result has the given strides, so that everything after it is traced for that layout. The
pass `set_gradient_layouts` replaces it by the gradient itself, which has that layout at run time: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from planner.tracer.host.kernels import RecordedRead
from planner.tracer.host.state import HostState
from planner.tracer.opaque.call import OpaqueCall

Strides = tuple[int, ...]

_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definition
_LIBRARY.define("incoming_gradient(Tensor gradient, int[] stride) -> Tensor")


@torch.library.register_fake("checkpoint_planner::incoming_gradient", lib=_LIBRARY)
def _fake_incoming_gradient(gradient: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(gradient.shape, stride, dtype=gradient.dtype, device=gradient.device)


_INCOMING = torch.ops.checkpoint_planner.incoming_gradient.default


@dataclass(frozen=True, slots=True)
class Replay:
    """What an earlier capture of the call found, and the backward that is captured now.

    Attributes:
        strides: per result, the strides of the gradient that comes through it; None where none comes.
        recorded: (kernel, value) that answer the model's host reads; None where no forward was recorded.
        calls: recorded calls of opaque modules, by key.
        host: what Python does beside the kernels.
        state: tensors like those that the call found in Python state, in the order of `HostState.state`.
    """

    strides: tuple[Strides | None, ...]
    recorded: Sequence[RecordedRead] | None = None
    calls: Mapping[str, OpaqueCall] = field(default_factory=dict)
    host: HostState = field(default_factory=HostState)
    state: Sequence[torch.Tensor] = ()


def usual_strides(output: torch.Tensor) -> Strides | None:
    """Strides of the gradient that elementwise operators make for an output; None where they are the output's own.

    They differ where the output lies in its storage with gaps (a slice) or twice (an expanded tensor).
    """
    strides = torch.empty_like(output).stride()
    return None if strides == output.stride() else strides


def with_strides(gradient: torch.Tensor, strides: Strides | None) -> torch.Tensor:
    """The gradient, traced as a tensor of these strides; None: as it is."""
    return gradient if strides is None else torch.ops.checkpoint_planner.incoming_gradient(gradient, list(strides))  # type: ignore[no-any-return]


def is_incoming_gradient(node: fx.Node) -> bool:
    """The node gives an incoming gradient its strides."""
    return node.target is _INCOMING
