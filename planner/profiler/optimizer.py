"""Bytes that an optimizer keeps between steps, counted on tensors without data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import InputError
from planner.units import shown

Optimizer = (
    str | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
)
"""A name of torch.optim in any case ("adamw"), an optimizer or several, or what makes one of a list of parameters."""

_MASTER = torch.float32
_VARIANTS = ("foreach", "fused", "capturable")
"""Settings of torch's optimizers that choose kernels, which may not run without data; they keep the same state."""


def master_bytes(model: nn.Module) -> int:
    """Bytes of a float32 copy of every trained parameter that is of a narrower floating-point dtype."""
    narrow = [p for p in _trained(model.parameters()) if p.dtype.itemsize < _MASTER.itemsize]
    return sum(p.numel() * _MASTER.itemsize for p in narrow)


def state_bytes(model: nn.Module, optimizer: Optimizer, *, master_weights: bool = False) -> int:
    """Bytes of the optimizer's state after its first step; nothing is allocated.

    A parameter of every shape and dtype takes one step on the meta device, where tensors have no data, and the bytes of what
    the optimizer then holds for it are counted. Scalars count too, though some optimizers keep these in host memory. State that
    an optimizer holds already is counted as it is.

    Args:
        model: its parameters that require grad are trained; by an optimizer that exists, that one's.
        optimizer: see `Optimizer`; with other arguments than the defaults: `functools.partial(torch.optim.SGD, momentum=0.9)`.
        master_weights: it updates float32 copies of narrower parameters, so that its state is float32 too.

    Raises:
        InputError: unknown, of another model, or its state cannot be counted this way.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return _bytes_of(model, optimizer, master_weights)
    if isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        return sum(_bytes_of(model, each, master_weights) for each in optimizer)
    make = _maker(optimizer)
    name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", shown(optimizer))
    return _bytes_after_a_step(_trained(model.parameters()), make, name, master_weights)


def trains(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether it trains a parameter of this model."""
    own = set(map(id, model.parameters()))
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _bytes_of(model: nn.Module, optimizer: torch.optim.Optimizer, master_weights: bool) -> int:
    """Bytes of the state that an optimizer holds, and of what it will hold for parameters that have none."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    if not trains(optimizer, model):
        raise InputError(
            f"give the optimizer of this model: the {type(optimizer).__name__} trains none of its parameters (was it made "
            "before the model was copied, or given new parameters?)"
        )
    total = sum(tensor.nbytes for tensor in _tensors(optimizer.state.values()))
    for group in groups:
        stateless = _trained(parameter for parameter in group["params"] if not optimizer.state.get(parameter))
        make = lambda parameters, group=group: _without_state(optimizer, {**group, "params": parameters})
        total += _bytes_after_a_step(stateless, make, type(optimizer).__name__, master_weights)
    return total


def _without_state(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> torch.optim.Optimizer:
    """A new optimizer of this class that trains one group, made as it is unpickled; hooks and schedulers are left behind."""
    group |= {name: False for name in _VARIANTS if name in group}
    group |= {name: float(value) for name, value in group.items() if isinstance(value, torch.Tensor)}
    made: torch.optim.Optimizer = object.__new__(type(optimizer))
    made.__setstate__({"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": [group]})
    return made


def _bytes_after_a_step(
    parameters: Iterable[nn.Parameter],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    name: str,
    master_weights: bool,
) -> int:
    """Bytes of the state that an optimizer holds for these parameters after one step, which is made without data."""
    kinds = Counter((tuple(p.shape), _MASTER if master_weights and p.dtype.itemsize < 4 else p.dtype) for p in parameters)
    total = 0
    for (shape, dtype), times in kinds.items():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        try:
            made = make([parameter])
            made.step()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"leave optimizer= out and set its bytes aside with reserve='2GiB': the state of optimizer {name} cannot be "
                f"counted without running it ({type(error).__name__}: {reason})"
            ) from error
        total += times * sum(tensor.nbytes for tensor in _tensors(made.state.values()))
    return total


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _maker(
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
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
