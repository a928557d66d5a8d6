"""What code around a unit does with tensors that the unit uses, too: its weights, and its inputs after its call.

Autograd adds up the gradients of several uses one by one, the last use first. A planned unit returns the sum over its own uses,
so that a sum over others' uses as well may have other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from planner._compat import pytree
from planner._compat.backward_state import in_backward
from planner._compat.dispatch import TorchDispatchMode
from planner._compat.tensors import address_of, storage_id
from planner.composite.in_place import put_into, replaced


class Uses(TorchDispatchMode):
    """While entered, notes which submodules' code uses each parameter, and which of their inputs are used after them.

    Attributes:
        weight_users: by a parameter's name, names of the submodules whose own code uses it where its gradient is needed.
        inputs_used_after: by a submodule's name, positions of those among the tensors of its call that are used again after it.
    """

    def __init__(self, model: nn.Module, made: Callable[[torch.Tensor], None]) -> None:
        """`made`: called with each view that takes the place of a tensor of the model's."""
        super().__init__()
        self._made = made
        self.weight_users: dict[str, set[str]] = {}
        self.inputs_used_after: dict[str, set[int]] = {}
        self._weights = {storage_id(p): name for name, p in model.named_parameters() if p.layout is torch.strided}
        self._casts: list[torch.Tensor] = []  # alive, so that no other tensor gets their memory
        self._inside = [""]
        self._replaced: list[tuple[list[Any], dict[int, torch.Tensor]]] = []
        self._hooks: list[RemovableHandle] = []

    def close(self) -> None:
        """The step is over: tensors that live on are watched no more."""
        for hook in self._hooks:
            hook.remove()
        self._casts.clear()

    def enter(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """A submodule is called: what to call it with instead."""
        self._inside.append(name)
        self.inputs_used_after.setdefault(name, set())
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        views: dict[int, torch.Tensor] = {}
        for i, tensor in enumerate(tensors):
            if tensor.requires_grad and id(tensor) not in views:
                views[id(tensor)] = self._watched(tensor, name, i)
        changed: list[Any] = []

        def view(tensor: torch.Tensor) -> torch.Tensor:
            return views.get(id(tensor), tensor)

        found = (
            tuple(replaced(arg, view, changed) for arg in args),
            {k: replaced(arg, view, changed) for k, arg in kwargs.items()},
        )
        self._replaced.append((changed, {id(views[id(tensor)]): tensor for tensor in tensors if id(tensor) in views}))
        return found

    def pass_by(self, name: str) -> None:
        """A submodule is called that is not watched."""
        self._inside.append(name)
        self._replaced.append(([], {}))

    def leave(self) -> None:
        """It returned: lists and dictionaries that it was given hold again what they did, but for what it wrote there."""
        self._inside.pop()
        containers, own = self._replaced.pop()
        for container in containers:
            put_into(container, lambda tensor: own.get(id(tensor), tensor), [])

    def _watched(self, tensor: torch.Tensor, name: str, i: int) -> torch.Tensor:
        """A view for the submodule alone. Autograd adds in place: the first gradient's memory holds the sum."""
        view = tensor.view_as(tensor)
        self._made(view)
        first: list[int | None] = []
        self._hooks.append(view.register_hook(lambda gradient: first.append(address_of(gradient))))

        def all_of_it(gradient: torch.Tensor) -> None:
            if first and (first[0] is None or address_of(gradient) != first[0]):  # unknown counts as used again
                self.inputs_used_after[name].add(i)

        self._hooks.append(tensor.register_hook(all_of_it))
        return view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and not in_backward() and func is not torch.ops.aten.detach.default:
            for tensor in pytree.tree_leaves((args, kwargs)):
                name = self._weight(tensor)
                if name is not None:
                    self.weight_users.setdefault(name, set()).add(self._inside[-1])
                    if func is torch.ops.aten._to_copy.default:  # autocast's, which all uses share
                        self._weights[storage_id(out)] = name
                        self._casts.append(out)
        return out

    def _weight(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad or tensor.layout is not torch.strided:
            return None
        return self._weights.get(storage_id(tensor))
