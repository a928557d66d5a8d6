"""What a forward returns and leaves in Python state, made of the forward graph's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.runtime.guards.call import MatchedCall
from planner.tracer.host.arguments import bound, with_returned
from planner.tracer.host.scopes import ARGUMENTS
from planner.tracer.host.state import written
from planner.tracer.host.written_values import Built
from planner.tracer.joint import Joint


def rebuild_output(joint: Joint, model: nn.Module, results: Sequence[torch.Tensor], call: MatchedCall) -> Any:
    """The model's output. Python state, and what the arguments hold, is left as the model's own forward leaves it.

    Args:
        results: of the forward graph.
    """
    tensors = call.tensors
    leaves = [
        results[out.result] if out.result is not None else tensors[out.input] if out.input is not None else out.constant
        for out in joint.outputs
    ]
    for out, leaf in zip(joint.outputs, leaves, strict=True):
        if out.is_leaf:
            leaf.requires_grad_()  # from here on autograd fills its `.grad`, as that of eager's
    out = pytree.tree_unflatten(leaves, joint.call.out_spec)
    with bound(call.args, call.kwargs):
        given = {path: path.get(model) for _, path in joint.call.returned if path.scope is ARGUMENTS}
        write_state(joint, model, results, tensors)
        for path, number in zip(joint.host.counts.places, call.counts, strict=True):
            path.set(model, number)
        if call.state is not None:
            call.state.note()
        containers = [given[path] if path in given else path.get(model) for _, path in joint.call.returned]
        return with_returned(out, joint.call.returned, containers)


def write_state(joint: Joint, model: nn.Module, results: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """Leave in Python state what the model's own forward leaves there.

    Args:
        results: of the forward graph.
        tensors: the call's, then those of Python state. The call is bound (`arguments.bound`).
    """
    if joint.host.effects:
        weights = dict((*model.named_parameters(), *model.named_buffers()))
        of_source: dict[str, Callable[[Any], Any]] = {
            "result": results.__getitem__,
            "input": tensors.__getitem__,
            "weight": weights.__getitem__,
            "container": lambda path: path.get(model),
        }
        built: Built = {}
        for effect in joint.host.effects:
            effect.write(model, lambda ref: of_source[ref.source](ref.key), built)


def backward_starts(joint: Joint, model: nn.Module, leaves: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that the planned backward starts from, after a forward of `model`: outputs, and tensors left on modules.

    Args:
        leaves: of what the forward returned; its call is bound where it writes into its arguments.
    """
    found = {out.result: leaves[i] for i, out in enumerate(joint.outputs) if out.differentiated}
    wanted = {out.result for out in joint.left if out.differentiated}
    for effect in joint.host.effects if wanted else ():
        for ref, tensor in written(effect, model):
            if ref.source == "result" and ref.key in wanted and isinstance(tensor, torch.Tensor):
                found.setdefault(ref.key, tensor)
    return list(found.values())
