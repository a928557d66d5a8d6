"""Run one call of the model on other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.private_names import MODULE_HOOKS
from planner.errors import CaptureError
from planner.tracer.call import CallSpec
from planner.tracer.host.arguments import WrittenArguments
from planner.tracer.host.fingerprint import is_generator
from planner.tracer.host.preserve import Preserved, keep_deep, keep_reachable
from planner.tracer.host.state import Effect
from planner.tracer.libraries import is_users_hook


class Called(NamedTuple):
    """What a call of the model did.

    Attributes:
        output: what it returned.
        written: what it wrote into lists and dictionaries among its arguments.
        arguments: knows these.
    """

    output: Any
    written: tuple[Effect, ...]
    arguments: WrittenArguments


def run_call(
    model: nn.Module, call: CallSpec, tensors: Sequence[torch.Tensor], weights: dict[str, torch.Tensor] | None = None
) -> Called:
    """Call the model with `tensors` in place of the call's own.

    Args:
        call: its `out_spec` is not used.
        tensors: one per tensor leaf of the call; more may follow.
        weights: parameters and buffers to use, each under one of its names; changed where the forward assigns buffers.

    Raises:
        CaptureError: the forward writes into its arguments what no plan can write.
    """
    leaves = list(call.leaves)
    for position, tensor in zip(call.tensors, tensors, strict=False):
        leaves[position] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, call.in_spec)
    known = [*model.parameters(), *model.buffers(), *tensors] if weights is None else None  # a trace has others
    arguments = WrittenArguments(args, kwargs, known)
    with own_hooks_left_out(model), _objects_unchanged(leaves):
        if weights is None:
            out = model(*args, **kwargs)
        else:
            out = torch.func.functional_call(model, weights, args, kwargs, tie_weights=True)
    return Called(out, arguments.found(), arguments)


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
def _objects_unchanged(leaves: Sequence[Any]) -> Iterator[None]:
    """Restore, at exit, what a forward wrote into objects and arrays among its arguments.

    Raises:
        CaptureError: it did write.
    """
    kept = Preserved(guards_iterators=False)
    given = [leaf for leaf in leaves if not is_generator(leaf) and not isinstance(leaf, torch.Tensor)]
    keep_reachable(kept, [item for leaf in given for item in keep_deep(kept, leaf, {})], {})
    try:
        yield
    finally:
        changed = kept.restore()
    if changed:
        raise CaptureError(
            "the model's forward writes into an object or array that it is given as an argument, which a plan would leave as "
            "it is. Let it write into a copy: copy.copy(argument)"
        )
