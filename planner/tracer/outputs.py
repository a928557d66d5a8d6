"""What a model may return besides tensors, and what is left out of a planned output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from planner.errors import CaptureError, warn
from planner.tracer.joint import Output
from planner.tracer.libraries import RETURN_DICT, is_cache

_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_warned: WeakSet[nn.Module] = WeakSet()
"""Models whose left-out outputs were said."""


def check_constant(leaf: Any, name: str) -> None:
    """Raise CaptureError unless a plan can return this output, which is no tensor, as it is."""
    if isinstance(leaf, _CONSTANTS) or is_cache(leaf):
        return
    kind = type(leaf)
    cure = f"Register it: torch.utils._pytree.register_pytree_node({kind.__qualname__}, flatten, unflatten)"
    if hasattr(kind, "__dataclass_fields__"):
        cure = f"Register it: torch.export.register_dataclass({kind.__qualname__})"
    switch = "set return_dict=False: " if kind.__module__.startswith(RETURN_DICT) else ""
    raise CaptureError(
        f"{switch}the model returns a {kind.__module__}.{kind.__qualname__} ({name}), which is not a known container of "
        f"tensors. {cure}, or return its tensors in a tuple or dict"
    )


def without_caches(leaves: Sequence[Any]) -> list[Any]:
    """An output's leaves without caches, and without the None that replaces one (transformers drops a field that is None)."""
    return [leaf for leaf in leaves if leaf is not None and not is_cache(leaf)]


def warn_left_out(model: nn.Module, outputs: Sequence[Output]) -> None:
    """Say, once for each model, which outputs are None in a planned step."""
    left = [out.name for out in outputs if out.left_out]
    if not left or model in _warned:
        return
    _warned.add(model)
    warn(
        f"set model.config.use_cache=False: a planned {type(model).__name__} returns None as {', '.join(left)}, because a "
        "key-value cache is of no use in training (gradient checkpointing leaves it out too)"
    )
