"""Checks of what users pass in: every public function calls these first, so that a wrong type is one clear InputError.

Budgets are read by `planner.units`. Nothing here imports torch before there is a model.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from planner.errors import InputError, first_line
from planner.units import kind, shown

_MOST = 2**31
"""More stages, rounds or points than anybody waits for."""


def check_model(model: Any, what: str = "model") -> None:
    """Raise InputError unless `model` is an nn.Module whose Python forward can be run."""
    import torch

    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"give the nn.Module that torch.jit compiled: {what} is {kind(model)}, which cannot be captured")
    if isinstance(model, torch.nn.Module):
        if not hasattr(model, "_modules") or not hasattr(model, "_parameters"):
            raise InputError(
                f"call super().__init__() in the __init__ of {type(model).__name__}, of which {what} is an instance"
            )
        return
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise InputError(f"give an instance of {model.__name__}, {model.__name__}(...): {what} is {kind(model)}")
    if isinstance(model, type) or not callable(model):
        raise InputError(f"{what} is {kind(model)}, not a torch.nn.Module")
    raise InputError(f"{what} is {kind(model)}, not a torch.nn.Module: put what it computes into a module's forward")


def check_call(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call `model(*args, **kwargs)`; a single tensor is the only positional argument.

    Raises:
        InputError: these cannot be the arguments of a call.
    """
    if _is_tensor(args):
        args = (args,)
    if isinstance(args, Mapping):
        raise InputError(f"pass kwargs=batch for model(**batch), or args=(batch,) for model(batch): args is {kind(args)}")
    if not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
        raise InputError(f"give the example call's positional arguments as a tuple, args=(x,): args is {kind(args)}")
    positional = _items(args, "args")
    if kwargs is None:
        return positional, {}
    if not isinstance(kwargs, Mapping):
        raise InputError(f"give keyword arguments by name, kwargs={{'labels': y}}: kwargs is {kind(kwargs)}")
    for name in _items(kwargs, "kwargs"):
        if not isinstance(name, str):
            raise InputError(f"name keyword arguments by strings: kwargs has the key {shown(name)}, {kind(name)}")
    return positional, dict(kwargs)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # there is no tensor where torch was not imported
    return torch is not None and isinstance(value, torch.Tensor)


def _items(value: Iterable[Any], what: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except Exception as error:  # a class of the user's may raise anything
        raise InputError(
            f"give {what} as a tuple or dict: {what} is {kind(value)} whose iteration fails, {first_line(error)}"
        ) from error


def _as_number(value: Any) -> Any:
    """A float, an int, or what was given where it is neither; an infinity where no float is large enough."""
    if not isinstance(value, Real) or isinstance(value, (bool, int)):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def seconds(value: Any, what: str = "time_limit_s") -> float:
    """A time limit.

    Raises:
        InputError: no positive, finite number of seconds.
    """
    number = _as_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
        raise InputError(f"{what}={shown(value)}: give a positive number of seconds, such as 10.0")
    return float(min(number, _MOST))


def effort(value: Any, what: str = "effort") -> float:
    """Work for the solver.

    Raises:
        InputError: no positive, finite number.
    """
    number = _as_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
        raise InputError(f"{what}={shown(value)}: give a positive number, about the solver's seconds, such as 10.0")
    return float(min(number, _MOST))


def count(value: Any, what: str, *, least: int = 1) -> int:
    """A number of things.

    Raises:
        InputError: no integer, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= _MOST:  # type: ignore[operator]
        raise InputError(f"{what}={shown(value)}: give an integer, at least {least}")
    return int(value)


def flag(value: Any, what: str) -> bool:
    """True or False.

    Raises:
        InputError: neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"{what}={shown(value)}: give True or False")
    return value


def check_flags(**flags: Any) -> None:
    """Raise InputError unless these are True or False."""
    for name, value in flags.items():
        flag(value, name)


def calls(value: Any, what: str) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]:
    """Calls of a model, as (args, kwargs).

    Raises:
        InputError: something else.
    """
    example = f"give calls as (args, kwargs), {what}=[((x,), {{'labels': y}})]"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise InputError(f"{what} is {kind(value)}: {example}")
    for call in value:
        if not isinstance(call, (tuple, list)) or len(call) != 2:
            raise InputError(f"{what} holds {kind(call)}: {example}")
    return tuple(check_call(args, kwargs) for args, kwargs in value)


def names(opaque: Any, what: str = "opaque") -> tuple[str, ...]:
    """Qualified names of submodules; a single one may be given as a string.

    Raises:
        InputError: other things than names.
    """
    if isinstance(opaque, str):
        return (opaque,)
    if not isinstance(opaque, Collection) or isinstance(opaque, (bytes, Mapping)):
        raise InputError(f"{what} is {kind(opaque)}: give qualified names of submodules, {what}=('encoder.rnn',)")
    for name in opaque:
        if not isinstance(name, str):
            raise InputError(f"{what} holds {kind(name)}: give qualified names of submodules, {what}=('encoder.rnn',)")
    return tuple(opaque)


def loss_choice(loss: Any, what: str = "loss") -> Any:
    """Which output backward starts from: a name, a position (of any integer type), a function or None.

    Raises:
        InputError: something else.
    """
    if loss is None or isinstance(loss, str) or (callable(loss) and not isinstance(loss, type)):
        return loss
    if isinstance(loss, Integral) and not isinstance(loss, bool):
        return int(loss)
    raise InputError(
        f"{what} is {kind(loss)}: give the output's name (loss='loss'), its position (loss=1), or a function of the output "
        "that returns the tensors backward starts from"
    )


def optimizer_choice(optimizer: Any, what: str = "optimizer") -> Any:
    """An optimizer, a sequence of optimizers, an optimizer's name, what makes one of a list of parameters, or None.

    Raises:
        InputError: something else.
    """
    if optimizer is None or isinstance(optimizer, str) or callable(optimizer) or _is_optimizer(optimizer):
        return optimizer
    if isinstance(optimizer, (tuple, list)) and optimizer and all(map(_is_optimizer, optimizer)):
        return tuple(optimizer)
    raise InputError(
        f"give {what} as a name of torch.optim such as 'adamw', or as an optimizer (several in a tuple), or as what makes one "
        f"of a list of parameters, functools.partial(torch.optim.AdamW, lr=1e-3): {what} is {kind(optimizer)}"
    )


def _is_optimizer(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.optim.Optimizer)


def check_path(path: Any, what: str = "path") -> None:
    """Raise InputError unless this can name a file."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise InputError(f"{what} is {kind(path)}: give a file name, a str or a pathlib.Path")
    if "\0" in os.fspath(path) or not os.fspath(path):
        raise InputError(f"{what} {shown(path)} cannot name a file")


def check_plan(plan: Any, expected: type) -> None:
    """Raise InputError unless this is a Plan."""
    if isinstance(plan, expected):
        return
    cure = (
        "pass its plan, apply(module.plan, model, args)" if hasattr(type(plan), "attempt") else "pass apply(plan, model, args)"
    )
    raise InputError(f"{cure}, with a Plan or the name of its file as the first argument: plan is {kind(plan)}")


def check_planned(planned: Any, expected: type, function: str) -> None:
    """Raise InputError unless this is what plan() or apply() returned."""
    if not isinstance(planned, expected):
        raise InputError(f"{function} takes the module that plan() returned, not {kind(planned)}")


def check_function(function: Any, what: str, example: str) -> Callable[..., Any]:
    """The function.

    Raises:
        InputError: it cannot be called.
    """
    if not callable(function):
        raise InputError(f"{what} is {kind(function)}, not a function: {example}")
    return function  # type: ignore[no-any-return]
