"""Hooks on opaque modules: the user's own, and what they keep."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner.errors import InputError
from planner.tracer.host.scopes import each_named
from planner.tracer.host.values import members
from planner.tracer.libraries import is_users_hook

_MOST_VALUES = 10_000
"""Values held by hooks that are examined."""


def users_hooks(module: nn.Module) -> list[Any]:
    """Hooks on a module and the modules in it that are not a library's."""
    return [hook for m in module.modules() for kind in MODULE_HOOKS for hook in vars(m)[kind].values() if is_users_hook(hook)]


def refuse_collecting_hooks(module: nn.Module, name: str) -> None:
    """Raise InputError where hooks keep tensors with an autograd graph: the loop could differentiate what no plan knows of."""
    todo, seen = users_hooks(module), set[int]()
    while todo and len(seen) < _MOST_VALUES:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            raise InputError(
                f"a forward hook on {name} keeps a tensor {list(value.shape)} that requires grad, for a loss of the loop; "
                "a plan knows no gradient that arrives there. Return it from the model, or keep it detached in the hook"
            )
        todo += [item for _, item in members(value, lambda _, __: True)]
        if isinstance(value, types.FunctionType):
            todo += [scope[name] for scope, name in each_named(value.__code__, value.__globals__)]
