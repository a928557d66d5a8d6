"""Calls within one autocast region, which share the casts of their weights.

Eager casts a float32 weight once per region: the gradients of several calls are added up in the narrow dtype and cast back
once. A planned call casts for itself. So the second call in a region is noticed.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from planner.errors import PlanMissError
from planner.runtime.mismatch import Mismatch

_TWICE = (
    "the planned model is called a second time within one torch.autocast region. Eager's calls share the casts of the weights "
    "there, and add up their gradients in {} before these are cast back; planned calls do not. Enter torch.autocast anew "
    "for each call, or plan and train with torch.autocast(..., cache_enabled=False)"
)


class SharedCasts:
    """Tells whether a model was called before in the present autocast region."""

    def __init__(self) -> None:
        self._probe: torch.Tensor | None = None
        self._cast: Any = None
        self._was_planned = False

    def enter(self, device: torch.device, planned: bool) -> Mismatch | None:
        """Note a call; a Mismatch where it has to run unplanned, as an earlier one in this region did.

        Raises:
            PlanMissError: an earlier call in this region ran planned, so that neither way equals eager's.
        """
        is_first = self._is_first(device)
        if is_first or not planned:
            self._was_planned = planned if is_first else self._was_planned
            return None
        if self._was_planned:
            raise PlanMissError(_TWICE.format(str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")))
        return Mismatch("mode", "the autocast region", "the model was called in it before", "one call")

    def _is_first(self, device: torch.device) -> bool:
        """A weight of our own, without elements, is cast anew: the cache is empty, or was emptied since."""
        probe = self._probe
        if probe is None or probe.device != device:
            probe = self._probe = torch.ones((0, 0), device=device, requires_grad=True)
        with torch.enable_grad():
            product = torch.mm(probe, probe)
        node: Any = product.grad_fn
        cast, self._cast = self._cast, node.next_functions[0][0]
        return cast is not self._cast


_KNOWN: WeakKeyDictionary[nn.Module, SharedCasts] = WeakKeyDictionary()
"""By model: all its plans share them."""


def enter_planned(model: nn.Module, device: torch.device) -> Mismatch | None:
    """Note a planned call; see `SharedCasts.enter`."""
    return _KNOWN.setdefault(model, SharedCasts()).enter(device, planned=True) if _are_cached(device) else None


def note_unplanned(model: nn.Module, device: torch.device) -> None:
    """Note a call of the model's own forward."""
    if _are_cached(device):
        _KNOWN.setdefault(model, SharedCasts()).enter(device, planned=False)


def _are_cached(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()
