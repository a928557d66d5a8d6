"""TensorReadGuard: whether tensors show the gradients, flags and attributes that the forward read of them when captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from planner.runtime.guards.mismatch import Mismatch, MismatchKind
from planner.tracer.host.fingerprint import alike, first_difference
from planner.tracer.host.tensor_reads import shown, shows_itself
from planner.tracer.host.values import ABSENT
from planner.tracer.joint import Joint

_KINDS: dict[str, MismatchKind] = {"weight": "weight", "input": "argument", "state": "host"}
_SINGLE = (ABSENT, None, True, False)
"""Values that are equal only where they are the same object."""


class TensorReadGuard:
    """Compares what one model's forward reads of tensors beside their data and form; most forwards read nothing of the kind.

    Args:
        model: the model, or a copy of the one that was planned.
        joint: the captured step.
    """

    def __init__(self, model: nn.Module, joint: Joint) -> None:
        self._model, self._reads, self._inputs_at = model, joint.host.key.tensors, joint.host.key.inputs_at
        self._asks = joint.host.key.compares_identities
        self._position = {name: i for i, (name, _) in enumerate(joint.weights)}

    def mismatch(self, held: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Mismatch | None:
        """The first attribute that is not as planned.

        Args:
            held: the model's tensors, in the order of `Joint.weights`.
            tensors: the call's.
        """
        for read in self._reads:
            place = read.place
            tensor: Any
            if place.kind == "weight":
                tensor = held[self._position[place.key]]
            else:
                tensor = tensors[place.key] if place.kind == "input" else place.key.get(self._model)
            if not isinstance(tensor, torch.Tensor):
                return Mismatch(_KINDS[place.kind], str(place), f"a {type(tensor).__name__}", "a tensor")
            if (
                shows_itself(read.name)
                and any(read.value is one for one in _SINGLE)
                and getattr(tensor, read.name, ABSENT) is read.value
            ):
                continue
            now = shown(tensor, read.name)
            if not alike(read.expected, now, copied=True):
                found = first_difference(read.expected, now, f"{place}.{read.name}")
                return Mismatch(_KINDS[place.kind], found.where, found.now, found.planned, found.is_absent)
        for path, planned in self._inputs_at:
            value = path.get(self._model)
            now = next((i for i, tensor in enumerate(tensors) if tensor is value), None)
            if now != planned:
                now_text, planned_text = ("no input" if i is None else f"input {i}" for i in (now, planned))
                return Mismatch("host", str(path), now_text, planned_text)
        if self._asks and len({*map(id, held)}) != len(held):
            text = "weights are the same tensor that were two when the plan was made, and the forward asks which are"
            return Mismatch("weight", "which weights are tied", text=text)
        return None
