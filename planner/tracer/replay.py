"""Capture of a call that was captured before, for gradients of other outputs or in other layouts.

The traced identity at each output (`planner.tracer.capture`) passes its gradient through `handed_gradient`, a kernel that
exists in the trace only: its fake result has the given strides, so that everything behind it is traced for that layout. The
normal form replaces it by the gradient itself (`set_layouts`), which has that layout at run time: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from planner.tracer.host.state import HostState
from planner.tracer.part import PartCall

Strides = tuple[int, ...]

_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definition
_LIBRARY.define("handed_gradient(Tensor gradient, int[] stride) -> Tensor")


@torch.library.register_fake("checkpoint_planner::handed_gradient", lib=_LIBRARY)
def _fake_handed_gradient(gradient: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(gradient.shape, stride, dtype=gradient.dtype, device=gradient.device)


_HANDED = torch.ops.checkpoint_planner.handed_gradient.default


@dataclass(frozen=True, slots=True)
class Replay:
    """What an earlier capture of the call found, and the backward that is captured now.

    Attributes:
        strides: per result, the strides of the gradient that comes through it; None where none comes.
        recorded: values that answer the model's host reads; None where it reads none.
        calls: recorded calls of opaque modules, by key.
        host: what Python does beside the kernels.
    """

    strides: tuple[Strides | None, ...]
    recorded: Sequence[tuple[str, Any]] | None = None
    calls: Mapping[str, PartCall] = field(default_factory=dict)
    host: HostState = field(default_factory=HostState)


def usual_strides(output: torch.Tensor) -> Strides | None:
    """Strides of the gradient that elementwise operators make for an output; None where they are the output's own.

    They differ where the output lies in its storage with gaps (a slice) or twice (an expanded tensor).
    """
    strides = torch.empty_like(output).stride()
    return None if strides == output.stride() else strides


def with_strides(gradient: torch.Tensor, strides: Strides | None) -> torch.Tensor:
    """The gradient, traced as a tensor of these strides; None: as it is."""
    return gradient if strides is None else torch.ops.checkpoint_planner.handed_gradient(gradient, list(strides))  # type: ignore[no-any-return]


def set_layouts(graph: fx.Graph) -> None:
    """Replace every `handed_gradient` by the gradient, which takes over its layout."""
    for node in graph.find_nodes(op="call_function", target=_HANDED):
        gradient = node.args[0]
        gradient.meta["val"] = node.meta["val"]  # type: ignore[union-attr]
        node.replace_all_uses_with(gradient)
        graph.erase_node(node)
