"""Bytes that an optimizer keeps between steps, counted on tensors without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from planner.errors import InputError
from planner.units import shown

Optimizer = str | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""A name of torch.optim in any case ("adamw"), or what makes an optimizer of a list of parameters."""

_MASTER = torch.float32


def master_bytes(model: nn.Module) -> int:
    """Bytes of a float32 copy of every trained parameter that is of a narrower floating-point dtype."""
    narrow = [p for p in _trained(model) if p.dtype.itemsize < _MASTER.itemsize]
    return sum(p.numel() * _MASTER.itemsize for p in narrow)


def state_bytes(model: nn.Module, optimizer: Optimizer, *, master_weights: bool = False) -> int:
    """Bytes of the optimizer's state after its first step; nothing is allocated.

    A parameter of every shape and dtype takes one step on the meta device, where tensors have no data, and the bytes of what
    the optimizer then holds for it are counted. Scalars count too, though some optimizers keep these in host memory.

    Args:
        model: its parameters that require grad are trained.
        optimizer: see `Optimizer`; with other arguments than the defaults: `functools.partial(torch.optim.SGD, momentum=0.9)`.
        master_weights: it updates float32 copies of narrower parameters, so that its state is float32 too.

    Raises:
        InputError: unknown, or its state cannot be counted this way.
    """
    make = _maker(optimizer)
    kinds = Counter((tuple(p.shape), _MASTER if master_weights and p.dtype.itemsize < 4 else p.dtype) for p in _trained(model))
    total = 0
    for (shape, dtype), times in kinds.items():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        try:
            made = make([parameter])
            made.step()
        except Exception as error:
            name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", shown(optimizer))
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the state of optimizer {name} cannot be counted without running it ({type(error).__name__}: {reason}); "
                "leave optimizer= out and set its bytes aside with reserve='2GiB'"
            ) from error
        total += times * sum(tensor.nbytes for tensor in _tensors(made.state.values()))
    return total


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _maker(optimizer: Optimizer) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    if not isinstance(optimizer, str):
        return optimizer
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]
    named: dict[str, Any] = {kind.__name__.lower(): kind for kind in kinds if kind is not torch.optim.Optimizer}
    if optimizer.lower() not in named:
        raise InputError(
            f"optimizer {shown(optimizer)} is not known: {', '.join(sorted(named))}. For another, pass what makes one of a "
            "list of parameters: functools.partial(torch.optim.SGD, momentum=0.9)"
        )
    return lambda parameters: named[optimizer.lower()](parameters)  # type: ignore[no-any-return]


def _tensors(states: Iterable[dict[str, Any]]) -> list[torch.Tensor]:
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
