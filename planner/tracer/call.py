"""How a call of the model maps onto flat tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from planner._compat import pytree
from planner.errors import InputError, first_line


def flatten_example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """(Leaves, pytree spec) of an example call.

    Raises:
        InputError: a container or object among the arguments raises an error when it is read, or built with other leaves.
    """
    try:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            isinstance(leaf, torch.Tensor)  # reads `__class__` of objects
        pytree.tree_unflatten(list(range(len(leaves))), spec)  # a PackedSequence reads what it is built from
    except Exception as error:
        raise InputError(
            "pass the example call's tensors in plain tuples, lists and dicts: an argument cannot be searched for tensors, "
            f"{first_line(error)}"
        ) from error
    return leaves, spec


@dataclass(frozen=True, slots=True)
class CallSpec:
    """How `model(*args, **kwargs)` maps onto flat tensors and back.

    Attributes:
        in_spec, out_spec: pytree specs of (args, kwargs) and of the output.
        leaves: the call's leaves; None where a tensor stood, which `tensors` lists.
        tensors: positions of the tensor leaves.
        returned: containers in the output that are among the arguments, or in Python state; see `Returned`.
        keywords: the call's keywords, in order.
        is_flat: every argument is a leaf.
    """

    in_spec: Any
    leaves: tuple[Any, ...]
    tensors: tuple[int, ...]
    out_spec: Any
    returned: tuple[Any, ...] = ()
    keywords: tuple[str, ...] = field(init=False)
    is_flat: bool = field(init=False)

    def __post_init__(self) -> None:
        args, kwargs = pytree.tree_unflatten(list(range(len(self.leaves))), self.in_spec)
        object.__setattr__(self, "keywords", tuple(kwargs))
        object.__setattr__(self, "is_flat", all(isinstance(leaf, int) for leaf in (*args, *kwargs.values())))

    def tensor_leaves(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """The tensor leaves of a call of this structure."""
        leaves = pytree.tree_leaves((args, kwargs))
        return [leaves[i] for i in self.tensors]

    def __reduce__(self) -> tuple[Any, ...]:
        """Specs travel as containers of leaf numbers: torch's spec classes warn when they are unpickled."""
        skeletons = (pytree.tree_unflatten(list(range(spec.num_leaves)), spec) for spec in (self.in_spec, self.out_spec))
        return _restore_call, (*skeletons, self.leaves, self.tensors, self.returned)


def _restore_call(
    inputs: Any, outputs: Any, leaves: tuple[Any, ...], tensors: tuple[int, ...], returned: tuple[Any, ...]
) -> CallSpec:
    return CallSpec(pytree.tree_structure(inputs), leaves, tensors, pytree.tree_structure(outputs), returned)


def without_history(tensor: torch.Tensor, memory: torch.Tensor | None = None, *, is_leaf: bool | None = None) -> torch.Tensor:
    """A tensor that gets gradients as this one does, and hands them to no one; hooks are left out.

    Like the given one it is a leaf of autograd or not: the two get gradients with different strides. Its own is in `grad`.

    Args:
        memory: what it shares the memory with; the tensor itself by default.
        is_leaf: whether it is a leaf; None: as the given one.
    """
    own = (tensor if memory is None else memory).detach().requires_grad_(tensor.requires_grad)
    if tensor.is_leaf if is_leaf is None else is_leaf:
        return own
    with torch.enable_grad():
        computed: torch.Tensor = _Computed.apply(own)
    computed.retain_grad()
    return computed


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data  # which is no view, so it may be written into

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> None:
        return None


def own_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with other tensors in the same memory: those given get no gradients by steps. The same ones stay the same."""
    memo: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = without_history(tensor)
        return memo[id(tensor)]

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, own, (args, kwargs))
    return found
