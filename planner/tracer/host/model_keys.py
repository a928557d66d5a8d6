"""What a plan takes for granted of a model's modules and weights, beside their contents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner.tracer.host.fingerprint import TensorKey, tensor_key
from planner.tracer.libraries import is_users_hook


@dataclass(frozen=True, slots=True)
class ModuleKey:
    """What a plan takes for granted of a module, beside its tensors and attributes.

    Attributes:
        name: qualified, "" for the model itself.
        kind: its class.
        hooks: which of its dictionaries of hooks held some of the user's.
        tied: (name of a parameter or buffer of its own, first qualified name of the same tensor), where these are two names.
    """

    name: str
    kind: type
    hooks: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]


def module_keys(model: nn.Module) -> tuple[ModuleKey, ...]:
    """Every module of the model, each once."""
    tensors = (*model.named_parameters(), *model.named_buffers())  # each once
    first = {id(tensor): name for name, tensor in tensors}
    keys = []
    for name, module in model.named_modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        own = (*parameters, *module.named_buffers(recurse=False, remove_duplicate=False))
        prefix = f"{name}." if name else ""
        tied = tuple((key, first[id(tensor)]) for key, tensor in own if first[id(tensor)] != f"{prefix}{key}")
        hooks = tuple(kind for kind in MODULE_HOOKS if any(map(is_users_hook, vars(module)[kind].values())))
        keys.append(ModuleKey(name, type(module), hooks, tied))
    return tuple(keys)


def weight_keys(model: nn.Module) -> tuple[tuple[str, TensorKey], ...]:
    """Name and metadata of every parameter and buffer, each tensor once."""
    return tuple((name, tensor_key(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers()))


def weight_places(model: nn.Module) -> frozenset[tuple[str, str]]:
    """(module, name) of every parameter and buffer but those that are None."""
    held = lambda module: (*vars(module)["_parameters"].items(), *vars(module)["_buffers"].items())
    return frozenset(
        (where, name) for where, module in model.named_modules() for name, tensor in held(module) if tensor is not None
    )
