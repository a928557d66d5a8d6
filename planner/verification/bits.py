"""One planned step compared bit for bit with one of the model's own from the same state: outputs, state and gradients.

The audit (planner/runtime/audit.py) compares forwards in the training loop; this finds differences of the backward, too, such
as a derivative that torch computes in another way while it traces.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.runtime.audit import Digest, difference, digest, digest_of, may_be_written, rewound
from planner.runtime.criterion import planned_model
from planner.runtime.install import uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.outputs import backward_starts
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.joint import Joint
from planner.verification.step_copy import CallArguments, aligned, autocast_of, backward_of_ones, cut_history


def different_results(planned: CheckpointedModule, call: CallArguments) -> tuple[str, ...]:
    """Names of what a planned step and the model's own leave different; empty where one of them does not repeat itself.

    Runs steps on the model itself, so call it in a process of its own. State is restored after each, gradients are not.
    """
    model = planned.original
    uninstall(model)

    def ours() -> Digest:
        return _step(planned, call, lambda: planned.attempt(*call)[0])

    def plain() -> Digest:
        return _step(planned, call, lambda: unplanned_forward(model)(*call[0], **call[1]))

    expected, found = plain(), ours()
    different = difference(expected, found)
    return different if different and not difference(expected, plain()) and not difference(found, ours()) else ()


def _step(planned: CheckpointedModule, call: CallArguments, forward: Callable[[], Any]) -> Digest:
    """Run one step; the fingerprints of what it changes or returns."""
    return step_digest(planned.original, planned.step.joint, call, forward, autocast=lambda: autocast_of(planned))


def step_digest(
    model: nn.Module,
    joint: Joint,
    call: CallArguments,
    forward: Callable[[], Any],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Digest:
    """Run a step and restore the state that it started from, except for gradients; the fingerprints of what it changes.

    Args:
        model, joint: the model, and its captured step.
        call: what `forward` calls the model with.
        forward: returns the model's output.
        autocast: makes the context that the forward runs in.
    """
    given = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    for tensor in (*model.parameters(), *given):
        tensor.grad = None
    rewinding = rewound(model, joint.host.key, may_be_written(model, joint, given), joint.device)
    with rewinding, bound_and_restored(*call), torch.enable_grad():
        cut_history(joint, model)
        with autocast():
            out = forward()
        leaves = aligned(joint, pytree.tree_leaves(out))
        backward_of_ones(backward_starts(joint, model, leaves), joint.device)
        outputs = [leaf for leaf, output in zip(leaves, joint.outputs, strict=True) if not output.left_out]
        found = digest(model, outputs, given, joint.device, joint.host)
        grads = {f"gradient of {name}": p.grad for name, p in planned_model(model).named_parameters()}
        grads |= {f"gradient of input {i}": tensor.grad for i, tensor in enumerate(given)}
        return found | digest_of(grads)
