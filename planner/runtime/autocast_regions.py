"""Autocast regions: several calls within one region share the casts of their weights in eager, and planned calls do not.

Eager casts a float32 weight once per region; gradients of several calls are summed in the narrow dtype and cast back once. A
planned call casts its weights itself. So a weight that is cast twice in a region, once by a planned call, is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import torch

from planner.errors import MismatchError
from planner.runtime.guards.mismatch import Mismatch

_TWICE = (
    "enter torch.autocast for each call alone, or plan and train with torch.autocast(..., cache_enabled=False): a weight is "
    "used by a planned call and by another call within one torch.autocast region. In eager the calls share its cast and sum "
    "their gradients in {} before these are cast back; planned calls do not"
)
_CAST_BEFORE = "a weight was already cast in this autocast region by an unplanned call"


class _Region:
    """The current autocast region of one thread on one device.

    Attributes:
        planned, unplanned: ids of the weights that planned and other calls have cast in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._probe = torch.ones((0, 0), device=device, requires_grad=True)
        self._cast: Any = None
        self.planned: set[int] = set()
        self.unplanned: set[int] = set()

    def begin(self) -> None:
        """Forget the weights if this is a new region: then the probe, a tensor without elements, is cast again."""
        with torch.enable_grad():
            product = torch.mm(self._probe, self._probe)
        node: Any = product.grad_fn
        last, self._cast = self._cast, node.next_functions[0][0]
        if last is not self._cast:
            self.planned, self.unplanned = set(), set()


class _Regions(threading.local):
    """Per thread, as autocast and its cache are."""

    def __init__(self) -> None:
        self.of_device: dict[torch.device, _Region] = {}


_REGIONS = _Regions()


def enter_planned(weights: Collection[torch.Tensor], device: torch.device) -> Mismatch | None:
    """Note a planned call that casts these weights; a Mismatch if an unplanned call in this region has cast one of them.

    Raises:
        MismatchError: a planned call in this region has cast one of them.
    """
    region = _present(device)
    if region is None:
        return None
    cast = set(map(id, weights))
    if cast & region.planned:
        raise MismatchError(_twice(device))
    if cast & region.unplanned:
        return Mismatch("mode", "the autocast region", text=_CAST_BEFORE)
    region.planned |= cast
    return None


def note_unplanned(weights: Collection[torch.Tensor], device: torch.device) -> None:
    """Note a call of a model's own forward.

    Raises:
        MismatchError: gradients are enabled, and a planned call in this region has cast one of its weights.
    """
    region = _present(device)
    if region is not None:
        cast = set(map(id, weights))
        if torch.is_grad_enabled() and cast & region.planned:
            raise MismatchError(_twice(device))
        region.unplanned |= cast


def _present(device: torch.device) -> _Region | None:
    """The region that this thread is in; None where autocast or its cache is off."""
    if not (torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()):
        return None
    if device not in _REGIONS.of_device:
        _REGIONS.of_device[device] = _Region(device)
    region = _REGIONS.of_device[device]
    region.begin()
    return region


def _twice(device: torch.device) -> str:
    return _TWICE.format(str(torch.get_autocast_dtype(device.type)).removeprefix("torch."))
