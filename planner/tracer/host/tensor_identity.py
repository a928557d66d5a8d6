"""Which tensors of a model, a call and Python state are which, and of which classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import CaptureError
from planner.tracer.host.foreign import package_of
from planner.tracer.host.path import Path
from planner.tracer.host.tensor_places import TensorPlace


def places(model: nn.Module, inputs: Sequence[torch.Tensor], before: Mapping[Path, Any]) -> dict[int, TensorPlace]:
    """Where the tensors are that exist before a forward, by identity.

    Args:
        inputs: the call's, as the user gave them.
        before: what the forward finds in Python state.
    """
    tensors = [(path, value) for path, value in before.items() if isinstance(value, torch.Tensor)]
    weights = dict((*model.named_parameters(), *model.named_buffers()))
    found = {id(tensor): TensorPlace("state", path) for path, tensor in reversed(tensors)}
    found |= {id(tensor): TensorPlace("weight", name) for name, tensor in weights.items()}
    return found | {id(inputs[i]): TensorPlace("input", i) for i in reversed(range(len(inputs)))}


def inputs_at(
    stand_ins: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    before: Mapping[Path, Any],
    only_written: Callable[[Path], bool],
) -> tuple[tuple[Path, int | None], ...]:
    """Tensors in Python state, each with the position of the call's tensor that it is, or None.

    Args:
        stand_ins: what the forward was given for `inputs`.
        before: what it found in Python state.
        only_written: it does not read this place.
    """
    position: dict[int, int] = {}
    for i, pair in enumerate(zip(stand_ins, inputs, strict=True)):
        for tensor in pair:
            position.setdefault(id(tensor), i)
    found = ((path, value) for path, value in before.items() if isinstance(value, torch.Tensor) and not only_written(path))
    return tuple((path, position.get(id(value))) for path, value in found)


def weight_classes(model: nn.Module, inputs: Sequence[torch.Tensor], names: Collection[str]) -> tuple[tuple[str, type], ...]:
    """Weights of classes that are not torch's.

    Args:
        names: that the code which ran uses.

    Raises:
        CaptureError: the code names the class of a weight or an input (`isinstance(weight, Mine)`): a traced one has another.
    """
    found = [(name, own_tensor_class(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    for name, kind in (*found, *((f"input {i}", own_tensor_class(tensor)) for i, tensor in enumerate(inputs))):
        if kind is not None and any(base.__name__ in names for base in _own_bases(kind)):
            raise CaptureError(
                f"the model's forward asks for the class of {name} ({kind.__qualname__}), which a traced tensor does not "
                "have: keep what it decides in an attribute of the module"
            )
    return tuple((name, kind) for name, kind in found if kind is not None)


def _own_bases(kind: type) -> list[type]:
    """The class and those it is derived from, down to torch's."""
    return [base for base in kind.__mro__ if issubclass(base, torch.Tensor) and package_of(base) != "torch"]


def own_tensor_class(tensor: torch.Tensor) -> type | None:
    """A tensor's class where it is not torch's own."""
    kind = type(tensor)
    return None if kind is torch.Tensor or kind is nn.Parameter or package_of(kind) == "torch" else kind
