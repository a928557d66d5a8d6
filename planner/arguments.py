"""Checks of what users pass in: every public function calls these first, so that a wrong type is one clear InputError.

Budgets are read by `planner.units`. Nothing here imports torch before there is a model.
"""

from __future__ import annotations

import math
import os
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
        raise InputError(f"{what} is {kind(model)}, compiled by torch.jit, and cannot be captured: give the nn.Module itself")
    if isinstance(model, torch.nn.Module):
        if not hasattr(model, "_modules") or not hasattr(model, "_parameters"):
            raise InputError(f"{what} is {kind(model)} whose __init__ did not call super().__init__()")
        return
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise InputError(f"{what} is {kind(model)}: give an instance of it, {model.__name__}(...)")
    if isinstance(model, type) or not callable(model):
        raise InputError(f"{what} is {kind(model)}, not a torch.nn.Module")
    raise InputError(f"{what} is {kind(model)}, not a torch.nn.Module: put what it computes into a module's forward")


def check_call(args: Any, kwargs: Any) -> None:
    """Raise InputError unless `model(*args, **kwargs)` can be called with these."""
    if isinstance(args, Mapping):
        raise InputError(f"args is {kind(args)}: keyword arguments go into kwargs={{'labels': y}}, args takes a tuple, (x,)")
    if args is None:
        raise InputError("args is None: give the example call's positional arguments as a tuple such as (x,), or ()")
    if not isinstance(args, Sequence) or isinstance(args, (str, bytes)):
        raise InputError(f"args is {kind(args)}: give the example call's positional arguments as a tuple, args=(x,)")
    _items(args, "args")
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs is {kind(kwargs)}: give the example call's keyword arguments, kwargs={{'labels': y}}")
    for name in _items(kwargs, "kwargs"):
        if not isinstance(name, str):
            raise InputError(f"kwargs has the key {shown(name)}, {kind(name)}: keyword arguments are named by strings")


def _items(value: Iterable[Any], what: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except Exception as error:  # a class of the user's may raise anything
        raise InputError(f"{what} is {kind(value)} whose iteration fails, {first_line(error)}: give a tuple or dict") from error


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
        check_call(*call)
    return tuple((tuple(args), dict(kwargs or {})) for args, kwargs in value)


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
    """An optimizer's name, what makes one of a list of parameters, or None.

    Raises:
        InputError: something else.
    """
    if optimizer is None or isinstance(optimizer, str) or callable(optimizer):
        return optimizer
    raise InputError(
        f"{what} is {kind(optimizer)}: give a name of torch.optim such as 'adamw', or what makes an optimizer of a list of "
        "parameters, functools.partial(torch.optim.AdamW, lr=1e-3)"
    )


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
    if isinstance(plan, (str, os.PathLike)):
        raise InputError(f"plan is the path {shown(os.fspath(plan))}: load it first, Plan.load({shown(os.fspath(plan))})")
    held = " (its plan: module.plan)" if hasattr(type(plan), "attempt") else ""
    raise InputError(f"plan is {kind(plan)}, not a Plan{held}: apply(plan, model, args, kwargs)")


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
