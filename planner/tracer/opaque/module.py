"""An opaque module inside a planned step: one kernel for its forward, one for its backward.

The forward kernel calls the submodule under autograd and returns a `SavedHandle` of that call's autograd graph; the backward
kernel takes the handle and returns gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from planner._compat import pytree
from planner._compat.switches import switches_as
from planner.errors import BackwardError, OpaqueModuleError, warn
from planner.tracer.opaque.call import OpaqueCall, TensorSpec
from planner.tracer.opaque.saved import (
    SavedHandle,
    SavedTensor,
    foreign_leaves,
    held_bytes,
    own_storages,
    release_slots,
    saving_hooks,
)
from planner.tracer.opaque.weight_attributes import weights_restored
from planner.units import format_bytes

_ADVICE = "make a larger part opaque: plan(..., opaque=[its parent])"


class _DetachedArgument(torch.autograd.Function):
    """Own autograd node, so that autograd.grad can target the argument without keeping the tensor alive."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError("internal error: a gradient left an opaque module; please report it")


class OpaqueModule:
    """A submodule and one recorded way of calling it: the two kernels."""

    def __init__(self, module: nn.Module, spec: OpaqueCall) -> None:
        self.module, self.spec = module, spec
        self._warns = spec.saved_tensor_bytes is not None

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Results, then the SavedHandle. `tensors`: arguments, parameters, buffers.

        Raises:
            OpaqueModuleError: the output is not of the recorded kind.
        """
        spec = self.spec
        num_arguments, num_weights = len(spec.arguments), len(spec.weights)
        arguments = [detached_argument(t, s.requires_grad and spec.grad) for t, s in zip(tensors, spec.arguments, strict=False)]
        given = tensors[num_arguments : num_arguments + num_weights]
        weights = weight_aliases(spec, given)
        buffers = dict(zip(spec.buffers, tensors[num_arguments + num_weights :], strict=True))
        with switches_as(spec.switches):
            handle, results, saved = run_under_autograd(self.module, spec, arguments, weights | buffers, self._results)
        if len(foreign_leaves(handle)) > spec.own_leaves:
            raise OpaqueModuleError(
                f"{spec.module}, which runs as it is, reads a tensor that requires grad and that an earlier call left: "
                "eager would differentiate that call once more, a plan cannot. Keep it detached, or train this model unplanned"
            )
        release_slots(saved, [*tensors[:num_arguments], *results], spec)
        handle.saved_bytes = held_bytes(saved, [*tensors, *weights.values(), *results])
        self._compare_bytes(handle.saved_bytes)
        return (*results, handle)

    def _compare_bytes(self, saved: int) -> None:
        """Warn, once, where autograd saves more than when the module was measured."""
        expected = self.spec.saved_tensor_bytes
        if self._warns and expected is not None and saved > expected:
            self._warns = False
            warn(
                f"{self.spec.module}, which runs as it is, saves {format_bytes(saved)} for its backward on this data, and at "
                f"most {format_bytes(expected)} on the data it was planned with: this step may need "
                f"{format_bytes(saved - expected)} more than its budget. Plan with a batch for which it saves as much"
            )

    def _results(self, out: Any) -> list[torch.Tensor]:
        leaves, out_spec = pytree.tree_flatten(out)
        spec = self.spec
        if out_spec != spec.call.out_spec:
            raise OpaqueModuleError(f"{spec.module} returned another structure than when it was planned; {_ADVICE}")
        results = []
        for leaf, expected in zip(leaves, spec.outputs, strict=True):
            if isinstance(expected, TensorSpec):
                if not isinstance(leaf, torch.Tensor) or TensorSpec.of(leaf) != expected:
                    found = str(TensorSpec.of(leaf)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                    raise OpaqueModuleError(f"{spec.module} returned {found}, and {expected} when it was planned; {_ADVICE}")
                results.append(leaf)
            elif isinstance(expected, tuple) and leaf != expected[0]:
                raise OpaqueModuleError(f"{spec.module} returned {leaf!r}, and {expected[0]!r} when it was planned; {_ADVICE}")
        return results

    def backward(
        self,
        grads: Sequence[torch.Tensor | None],
        handle: SavedHandle,
        read: Sequence[torch.Tensor],
        partial_sums: Sequence[torch.Tensor | None],
        retain: bool = False,
    ) -> list[torch.Tensor | None]:
        """Gradients of what `OpaqueCall.differentiated` lists; None for a parameter that this call had no use for.

        Args:
            grads: per result, its incoming gradient.
            handle: from `forward`.
            read: the arguments and results that `OpaqueCall.reads` lists (more may follow).
            partial_sums: per gradient, the sum of earlier contributions from outside of the module: the autograd engine starts
                with it, so that all contributions are added in eager's order.
            retain: the handle is used again.
        """
        spec = self.spec
        slots: list[Any] = [None] * (len(spec.arguments) + len(spec.results))
        places = (*spec.reads[0], *(len(spec.arguments) + i for i in spec.reads[1]))
        for place, tensor in zip(places, read, strict=False):
            slots[place] = tensor
        wanted = [handle.sources[i] for i in spec.differentiated]
        starts = (*zip(handle.results, grads, strict=True), *zip(wanted, partial_sums, strict=True))
        roots = [(edge, grad) for edge, grad in starts if edge is not None and grad is not None]
        handle.slots.given = slots
        try:
            edges, tangents = [edge for edge, _ in roots], [grad for _, grad in roots]
            found = torch.autograd.grad(edges, wanted, tangents, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]
        finally:
            handle.slots.given = ()
        num_arguments = sum(i < len(spec.arguments) for i in spec.differentiated)
        if any(grad is None for grad in found[:num_arguments]):
            raise BackwardError(f"an argument of {spec.module} got no gradient, but did when it was planned; {_ADVICE}")
        return list(found)


def weight_aliases(spec: OpaqueCall, weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters that share the weights' memory, by name, for one call; accumulating a gradient in one is an error."""
    made: dict[str, torch.Tensor] = {
        name: nn.Parameter(t.detach(), grad) for (name, grad), t in zip(spec.weights, weights, strict=True)
    }
    for parameter in made.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_refuse_inside, spec.module))
    return made


def _refuse_inside(module_name: str, *_: Any) -> NoReturn:
    raise BackwardError(
        f"backward came to a tensor that something in {module_name} kept of its inside (an attribute, a hook?); a plan knows "
        "no gradient there. Return that tensor from the model, or keep it detached"
    )


def detached_argument(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """The same data as an argument inside autograd, with an autograd node of its own if it requires grad."""
    if not requires_grad:
        return tensor.detach()
    with torch.enable_grad():  # a planned forward runs without
        return _DetachedArgument.apply(torch.empty(0, requires_grad=True), tensor)  # type: ignore[no-any-return]


def run_under_autograd(
    module: nn.Module,
    spec: OpaqueCall,
    arguments: Sequence[torch.Tensor],
    state: dict[str, torch.Tensor],
    results_of: Callable[[Any], list[torch.Tensor]],
) -> tuple[SavedHandle, list[torch.Tensor], list[SavedTensor]]:
    """Run the submodule as eager would.

    Args:
        arguments: per distinct tensor argument of the call.
        state: parameters and buffers by their names in the submodule.
        results_of: picks the results out of the output.

    Returns:
        the handle, the results without autograd, and what autograd saved.

    Raises:
        OpaqueModuleError: it writes into a container among its arguments.
    """
    leaves = list(spec.call.leaves)
    for position, place in zip(spec.call.tensors, spec.places, strict=True):
        leaves[position] = arguments[place]
    args, kwargs = pytree.tree_unflatten(leaves, spec.call.in_spec)
    handle = SavedHandle()
    saved, pack, unpack = saving_hooks(handle.slots, partial(_refuse_inside, spec.module))
    enabled, dtype = spec.autocast
    device = next(iter((*state.values(), *arguments))).device
    held, weights = _in_every_place(module, state)
    with (
        torch.set_grad_enabled(spec.grad),
        torch.autocast(device.type, dtype, enabled=enabled),
        saved_tensors_hooks(pack, unpack),
    ):
        with weights_restored(module, weights):
            out = torch.func.functional_call(module, held, args, kwargs, tie_weights=False)
        _check_containers(spec, leaves, (args, kwargs))
        found = results_of(out)
    if enabled:
        torch.clear_autocast_cache()  # no other module uses these casts
    for name, tensor in state.items():
        if held[name] is not tensor:  # self.buffer = new
            path, _, attribute = name.rpartition(".")
            module.get_submodule(path)._buffers[attribute] = held[name]
    handle.results = [get_gradient_edge(t) if t.requires_grad else None for t in found]
    sources = (*arguments, *(state[name] for name, _ in spec.weights))
    handle.sources = [get_gradient_edge(t) if t.requires_grad else None for t in sources]
    kept = list(saved)
    saved.clear()  # the hooks, which the graph holds, hold this list: with tensors of the graph in it, that would be a cycle
    return handle, own_storages([t.detach() for t in found]), kept


def _check_containers(spec: OpaqueCall, given: Sequence[Any], call: Any) -> None:
    """Refuse what the submodule writes into lists and dictionaries that it is given: the forward outside does not see it."""
    leaves, structure = pytree.tree_flatten(call)
    if structure != spec.call.in_spec or any(leaf is not before for leaf, before in zip(leaves, given, strict=True)):
        raise OpaqueModuleError(
            f"{spec.module} runs as it is, but writes into a list or dictionary that it is given. Return what it computes "
            "instead"
        )


def _in_every_place(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """(the state under the name of every place that holds it, shared tensors too; the module's own tensor by alias).

    A submodule that is registered twice is one place: with both its names, functional_call would leave the given tensors in it.
    """
    held = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    by_tensor = {id(held[name]): tensor for name, tensor in state.items()}
    places = {
        f"{path}.{name}".lstrip("."): by_tensor[id(tensor)]
        for path, submodule in module.named_modules()
        for name, tensor in (*submodule._parameters.items(), *submodule._buffers.items())
        if id(tensor) in by_tensor
    }
    return places, {id(tensor): held[name] for name, tensor in state.items() if held[name] is not tensor}
