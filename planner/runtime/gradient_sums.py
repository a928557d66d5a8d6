"""A watch on gradients that are sums: of the plan's own uses of an input, and of others' uses of it after the planned call."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from planner._compat.backward_state import backward_id
from planner._compat.tensors import address_of
from planner.errors import BackwardError
from planner.runtime.executable import Executable


def watch_sums(
    ctx: Any,
    inputs: Mapping[int, weakref.ref[torch.Tensor]],
    executable: Executable,
    stage: int,
    gradients: Sequence[torch.Tensor | None],
    *,
    is_other: bool,
) -> None:
    """Refuse, when autograd hands it on, the gradient of an input that the plan uses several times and others have used later.

    Eager adds up one use after the other, last use first, and floating-point sums depend on the order. A planned backward
    returns the sum over its own uses, so what autograd has before (of later uses) comes to it as one term more. Autograd adds
    in place, so the memory says whose gradient was the first.

    Args:
        ctx: the autograd node of the stage.
        inputs: those whose gradients are sums, by position.
        executable: of the planned step.
        stage: whose gradients are handed on.
        gradients: one per input of the stage.
        is_other: an OtherBackward has computed them, which returns no terms.
    """
    summed = executable.summed if is_other else executable.summed - executable.separated
    if not summed:
        return
    edges = ctx.next_functions[int(ctx.has_token) :]
    for position, gradient, (node, i) in zip(executable.owners[stage], gradients, edges, strict=True):
        if position in summed and gradient is not None and node is not None:
            given = inputs[position]()
            if given is None or not given._backward_hooks:  # which may return another tensor
                _watch_sum(node, i, address_of(gradient), executable.inputs[position])


def _watch_sum(node: Any, i: int, address: int | None, name: str) -> None:
    this = backward_id()

    def check(gradients: Sequence[torch.Tensor | None]) -> None:
        handle.remove()
        found = gradients[i] if backward_id() == this else None  # this one may have ended before it came here
        if found is not None and (address is None or address_of(found) != address):  # unknown counts as used again
            raise BackwardError(
                f"call backward() once for each call, or plan one module whose forward does all of it: {name} is used several "
                "times in a planned call, and used again after it (by another call, or by the loss) within one backward. Eager "
                "adds up these gradients one by one, and a plan's come as one sum, so the bits would differ. Gradients that "
                "were accumulated so far are incomplete: clear them"
            )

    handle = node.register_prehook(check)
