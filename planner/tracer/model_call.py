"""Run one call of the model on other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.private_names import MODULE_HOOKS
from planner.errors import CaptureError
from planner.tracer.call import CallSpec
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.preserve import Preserved, keep_deep, keep_reachable
from planner.tracer.libraries import is_users_hook


def run_call(
    model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor], weights: dict[str, torch.Tensor] | None = None
) -> Any:
    """The model's output for the call with `tensors` in place of its own.

    Args:
        call: its `out_spec` is not used.
        tensors: one per tensor leaf of the call; more may follow.
        weights: parameters and buffers to use, each under one of its names; changed where the forward assigns buffers.

    Raises:
        CaptureError: the forward writes into a container or object among its arguments.
    """
    leaves = list(call.leaves)
    for position, tensor in zip(call.tensors, tensors, strict=False):
        leaves[position] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    with own_hooks_left_out(model), _arguments_unchanged(leaves, call.in_spec, (args, kwargs)):
        if weights is None:
            return model(*args, **kwargs)
        return torch.func.functional_call(model, weights, args, kwargs, tie_weights=True)


@contextmanager
def own_hooks_left_out(model: nn.Module) -> Iterator[None]:
    """While entered, the user's hooks of the model itself do not run: they run around the planned call, as around any other."""
    held = object.__getattribute__(model, "__dict__")  # a recorder of reads follows `vars`
    before = {kind: held[kind] for kind in MODULE_HOOKS}
    for kind, hooks in before.items():
        held[kind] = type(hooks)((number, hook) for number, hook in hooks.items() if not is_users_hook(hook))
    try:
        yield
    finally:
        held.update(before)


@contextmanager
def _arguments_unchanged(leaves: Sequence[Any], spec: Any, call: Any) -> Iterator[None]:
    """Restore, at exit, what a forward wrote into the containers, objects and arrays among its arguments.

    Raises:
        CaptureError: it did write.
    """
    kept = Preserved(guards_iterators=False)
    keep_reachable(kept, [item for leaf in leaves if not is_generator(leaf) for item in keep_deep(kept, leaf, {})], {})
    try:
        yield
    finally:
        changed = kept.restore()
    now, spec_now = pytree.tree_flatten(call)
    if changed or spec_now != spec or any(one is not other for one, other in zip(leaves, now, strict=True)):
        raise CaptureError(
            "the model's forward writes into a list, dictionary, array or object that it is given as an argument, which a plan "
            "would leave as it is. Let it write into a copy: dict(argument), list(argument), copy.copy(argument)"
        )
