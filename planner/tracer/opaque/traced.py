"""Calls of opaque modules while the model is traced: one operator for the forward of each, one for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from planner._compat import pytree
from planner._compat.module_calls import calls_intercepted
from planner.errors import CaptureError
from planner.tracer.opaque.call import OpaqueCall, TensorSpec

_CALLS: ContextVar[Mapping[str, OpaqueCall]] = ContextVar("calls of opaque modules")
_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definitions
_LIBRARY.define("opaque_forward(Tensor[] tensors, str key) -> Tensor[]")
_LIBRARY.define("opaque_backward(Tensor?[] grads, Tensor handle, Tensor[] read, str key) -> Tensor[]")


@torch.library.register_fake("checkpoint_planner::opaque_forward", lib=_LIBRARY)
def _fake_forward(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    spec, device = _CALLS.get()[key], tensors[0].device
    handle = torch.empty(spec.saved_bytes, dtype=torch.uint8, device=device)
    return [*(result.empty(device) for result in spec.results), handle]


@torch.library.register_fake("checkpoint_planner::opaque_backward", lib=_LIBRARY)
def _fake_backward(grads: list[Any], handle: torch.Tensor, read: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    return [spec.empty(handle.device) for spec in _CALLS.get()[key].gradients if spec is not None]


FORWARD = torch.ops.checkpoint_planner.opaque_forward.default
BACKWARD = torch.ops.checkpoint_planner.opaque_backward.default


@contextmanager
def known(calls: Mapping[str, OpaqueCall]) -> Iterator[None]:
    """While entered, the operators' fake kernels find these calls: in the traced backward, too."""
    token = _CALLS.set(calls)
    try:
        yield
    finally:
        _CALLS.reset(token)


@contextmanager
def tracing(model: nn.Module, calls: Mapping[str, OpaqueCall]) -> Iterator[None]:
    """While entered, each call of an opaque module is traced as one operator."""
    counts: dict[str, int] = {}

    def trace(module: nn.Module, name: str, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        counts[name] = counts.get(name, 0) + 1
        spec = calls.get(f"{name}#{counts[name] - 1}")
        if spec is None:
            raise CaptureError(f"{name} is called more often while traced than in a real run", module=name)
        return _traced(module, spec, args, kwargs)

    with calls_intercepted({model.get_submodule(spec.module): spec.module for spec in calls.values()}, trace):
        yield


def _traced(module: nn.Module, spec: OpaqueCall, args: Any, kwargs: Any) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    arguments: list[Any] = [None] * len(spec.arguments)
    for position, place in zip(spec.call.tensors, spec.places, strict=True):
        arguments[place] = leaves[position]
    if [a.requires_grad for a in arguments] != [a.requires_grad for a in spec.arguments]:
        raise CaptureError(f"{spec.module} is given other arguments while traced than in a real run", module=spec.module)
    weights, buffers = dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False))
    state = [*(weights[name] for name, _ in spec.weights), *(buffers[name] for name in spec.buffers)]
    results = iter(_TracedCall.apply(spec, *arguments, *state))
    out = [next(results) if isinstance(o, TensorSpec) else o[0] if isinstance(o, tuple) else arguments[o] for o in spec.outputs]
    return pytree.tree_unflatten(out, spec.call.out_spec)


class _TracedCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: OpaqueCall, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *results, handle = torch.ops.checkpoint_planner.opaque_forward(list(tensors), spec.key)
        num_arguments = len(spec.arguments)
        weights = [tensors[num_arguments + i] for i, (_, trained) in enumerate(spec.weights) if trained]
        read = [tensors[i] for i in spec.reads[0]] + [results[i] for i in spec.reads[1]]
        ctx.spec, ctx.num_tensors = spec, len(tensors)
        ctx.save_for_backward(handle, *read, *weights)  # weights too: a write into one before is an error
        ctx.set_materialize_grads(False)
        fixed = [result for result, made in zip(results, spec.results, strict=True) if not made.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        handle, *read = ctx.saved_tensors
        found = torch.ops.checkpoint_planner.opaque_backward(list(grads), handle, read, ctx.spec.key)
        returned: list[Any] = [None] * ctx.num_tensors
        for i, grad in zip(ctx.spec.differentiated, found, strict=True):
            returned[i] = grad
        return (None, *returned)


def is_traced_call(node: fx.Node) -> bool:
    """The node is the forward of an opaque module, as the trace has it."""
    return node.target is FORWARD
