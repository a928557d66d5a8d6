"""ModelStateGuard: whether the model's modules, hooks and tensors are those that were captured.

It runs at every call and has to take microseconds. So dictionaries and getters are looked up once, when the guard is made, and
compared as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from planner._compat.private_names import MODULE_HOOKS
from planner._compat.tensors import tensors_alike
from planner.runtime.guards.host_state import HostStateGuard
from planner.runtime.guards.library import LibraryGuard
from planner.runtime.guards.mismatch import Mismatch
from planner.tracer.checks import hooks_last_node
from planner.tracer.host.path import named
from planner.tracer.host.values import find_in_class
from planner.tracer.joint import Joint
from planner.tracer.libraries import is_users_hook

_LISTS_OF_WEIGHTS = frozenset(
    ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "_parameters", "_buffers", "_named_members")
)
"""Code that names one of these may go over all parameters or buffers that there are."""
_OF_WEIGHTS = ("_parameters", "_buffers")


class ModelStateGuard:
    """Compares a model's modules, hooks, parameters and buffers with the captured ones; asks `HostStateGuard` about the rest.

    What is expected is what the capture found, not what this model is when the guard is made: it may be a copy that was made
    after the planned model was changed.

    Args:
        model: the model, or a copy of the one that was planned.
        joint: the captured step.
    """

    def __init__(self, model: nn.Module, joint: Joint) -> None:
        self._model, self._reads = model, joint.host.key.reads.attributes
        self.weight_classes = joint.host.key.weight_classes
        self.modules = tuple(model.modules())
        self._kinds: list[type] = [key.kind for key in joint.modules]
        self._names = [name or "the model" for name, _ in model.named_modules()]
        self._is_rebuilt = [name for name, _ in model.named_modules()] != [key.name for key in joint.modules]
        names = [name for name, _ in joint.weights]
        self._places = [] if self._is_rebuilt else [_place(model, name) for name in names]
        self.now = _reader(self._places)
        """Returns the tensors that the model holds now, in the order of `names`."""
        tied = [(f"{key.name}.{name}".lstrip("."), first) for key in joint.modules for name, first in key.tied]
        self._ties = [] if self._is_rebuilt else [(name, _place(model, name), names.index(first)) for name, first in tied]
        self._parents = [module._modules for module in self.modules]  # empty ones, too: something may be appended
        self._children = self._submodules()
        had = {key.name: key.hooks for key in joint.modules}
        self._without_hooks = [
            vars(module)[kind]
            for name, module in model.named_modules()
            for kind in MODULE_HOOKS
            if name and kind not in had.get(name, ())
        ]
        lists_weights = not _LISTS_OF_WEIGHTS.isdisjoint(joint.host.key.reads.names)
        self._registers = [vars(module)[kind] for module in self.modules for kind in _OF_WEIGHTS] if lists_weights else []
        self._num_weights = list(map(len, self._registers))
        self._alike: Any = None
        self._libraries = LibraryGuard(joint.host.key.libraries)
        self._host = HostStateGuard(model, joint.host.key, lambda: named(model))

    def _submodules(self) -> tuple[list[int], list[nn.Module | None]]:
        return list(map(len, self._parents)), list(chain.from_iterable(held.values() for held in self._parents))

    def held(self, default: Any = None) -> tuple[torch.Tensor, ...] | None:
        """The tensors that the model holds; `default` where one is missing or is not a tensor."""
        try:
            found = self.now()
        except KeyError:
            return default  # type: ignore[no-any-return]
        return found if all(isinstance(tensor, torch.Tensor) for tensor in found) else default

    def missing(self) -> Mismatch:
        """The tensor that `held` did not find."""
        for holder, name in self._places:
            if not isinstance(holder.get(name), torch.Tensor):
                return Mismatch(
                    "weight", name, "absent" if name not in holder else f"a {type(holder[name]).__name__}", "a tensor"
                )
        return Mismatch("weight", "the model's tensors")

    def mismatch(self, *, through_forward: bool = False) -> Mismatch | None:
        """The first module, hook or piece of Python state that is not as planned; see `HostStateGuard.mismatch`."""
        if self._is_rebuilt:
            return Mismatch("module", "the model's submodules", text="a submodule was replaced, added or removed")
        if list(map(len, self._registers)) != self._num_weights:
            return Mismatch("weight", "the model's tensors", text="a parameter or buffer was added or removed")
        if list(map(type, self.modules)) != self._kinds:
            for name, module, kind in zip(self._names, self.modules, self._kinds, strict=True):
                if not isinstance(module, kind) or self._overrides(type(module), kind):  # fully_shard derives a class
                    return Mismatch("module", f"the class of {name}", type(module).__name__, kind.__name__)
            self._kinds = [type(module) for module in self.modules]
        if hooks_last_node(self._model):
            text = "it has a hook by register_backward_hook, which gets the gradients of the forward's last operation"
            return Mismatch("module", "the model's hooks", text=f"{text}; use register_full_backward_hook")
        if self._submodules() != self._children:
            return Mismatch("module", "the model's submodules", text="a submodule was replaced, added or removed")
        if any(self._without_hooks):
            if any(is_users_hook(hook) for hooks in self._without_hooks for hook in hooks.values()):
                return Mismatch("module", "a submodule's hooks", text="a submodule has a new hook, which a plan would not call")
            self._without_hooks = [hooks for hooks in self._without_hooks if not hooks]
        return self._libraries.mismatch() or self._host.mismatch(through_forward=through_forward)

    def change(self, *, modes: bool) -> Mismatch | None:
        """The first submodule or piece of Python state that is not as planned; nothing is remembered.

        Args:
            modes: training mode counts, too.
        """
        if self._submodules() != self._children:
            return Mismatch("module", "the model's submodules", text="a submodule was replaced, added or removed")
        return next((found for found in self._host.changes() if modes or found.kind != "mode"), None)

    def forget(self) -> None:
        """See `HostStateGuard.forget`."""
        self._host.forget()

    def _overrides(self, derived: type, kind: type) -> bool:
        """Whether a derived class overrides an attribute that the forward reads."""
        names = (*self._reads.get(kind, ()), "forward", "__call__")
        return any(find_in_class(derived, name) is not find_in_class(kind, name) for name in names)

    def untied(self, held: Sequence[torch.Tensor]) -> str:
        """Name of a tensor that was tied to another when the guard was made and no longer is; "" if none."""
        return next((name for name, (holder, key), i in self._ties if holder.get(key) is not held[i]), "")

    def alike(self, held: Sequence[torch.Tensor]) -> bool:
        """Whether the tensors have the metadata of those last given to `approve`; False says nothing."""
        return self._alike is not None and self._alike(held)

    def approve(self, held: Sequence[torch.Tensor]) -> None:
        """Note that these tensors are as planned: `alike` compares with them."""
        self._alike = tensors_alike(held)


def _reader(places: Sequence[tuple[dict[str, Any], str]]) -> Callable[[], tuple[Any, ...]]:
    """A function that looks up every (dictionary, key). Generated code: a loop takes twice as long."""
    holders = list({id(holder): holder for holder, _ in places}.values())
    position = {id(holder): i for i, holder in enumerate(holders)}
    given = ", ".join(f"d{i}" for i in range(len(holders)))
    looked_up = "".join(f"d{position[id(holder)]}[{name!r}], " for holder, name in places)
    made: dict[str, Any] = {}
    exec(f"def bind({given}):\n    def read():\n        return ({looked_up})\n    return read", made)
    return made["bind"](*holders)  # type: ignore[no-any-return]


def _place(model: nn.Module, qualified: str) -> tuple[dict[str, Any], str]:
    path, _, name = qualified.rpartition(".")
    module = model.get_submodule(path)
    holder = module._parameters if name in module._parameters else module._buffers
    return holder, name
