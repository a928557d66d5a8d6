"""Opaque parts: submodules that cannot be captured and run as they are, each as one kernel forward and one backward.

The forward kernel calls the submodule under autograd and returns a `Ticket`: the autograd graph of that call. The backward
kernel takes the ticket and yields gradients. What autograd saves of the part's own arguments and results is not held by the
ticket but handed to the backward kernel again, so that a plan may free and recompute these as any other value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from planner._compat import pytree
from planner._compat.tensors import storage_id
from planner.errors import BackwardError, PartError
from planner.profiler.profile import KernelCost
from planner.tracer.call import CallSpec
from planner.tracer.weight_attributes import weights_put_back

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
_UNMEASURED = KernelCost(0, 0)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A dense tensor's shape, strides and dtype; for a result also whether it requires grad."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    def empty(self, device: torch.device) -> torch.Tensor:
        """A tensor of this kind."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        grad = ", requires_grad" if self.requires_grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} strides {self.stride}{grad}"


@dataclass(frozen=True, slots=True)
class PartCall:
    """One call of an opaque part, as a real run of the model found it.

    Attributes:
        key: "module.path#number of the call".
        module: qualified name of the submodule.
        call: how its arguments and its output map onto flat tensors; argument leaves that are tensors are listed once each.
        places: per tensor leaf of the call, which of the arguments it is.
        arguments: the distinct tensor arguments; `requires_grad` as in the run.
        weights: (name in the submodule, requires grad) of its parameters.
        buffers: names of its buffers in the submodule.
        outputs: per leaf of the output: a TensorSpec, the position of the argument it is, or a constant in a tuple.
        grad: gradients were enabled.
        autocast: (enabled, dtype) on the device.
        reads: (arguments, results) that autograd saves, by position.
        gradients: per argument, then per parameter: the gradient's TensorSpec, or None where it gets none.
        ticket_bytes: what the autograd graph holds besides arguments, results and parameters.
        forward, backward: measured.
        draws: it draws random numbers from the device's generator (forward, backward).
        mutates: names in the submodule of the parameters and buffers that it writes into.
        repeatable: a second run is sure to give the same bits and to change nothing, given the generator's state.
        own_leaves: tensors that the part makes itself and wants gradients of, for a backward inside of it.
    """

    key: str
    module: str
    call: CallSpec
    places: tuple[int, ...]
    arguments: tuple[TensorSpec, ...]
    weights: tuple[tuple[str, bool], ...]
    buffers: tuple[str, ...]
    outputs: tuple[Any, ...]
    grad: bool
    autocast: tuple[bool, torch.dtype]
    reads: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    gradients: tuple[TensorSpec | None, ...] = ()
    ticket_bytes: int = 0
    forward: KernelCost = _UNMEASURED
    backward: KernelCost = _UNMEASURED
    draws: tuple[bool, bool] = (False, False)
    mutates: tuple[str, ...] = ()
    repeatable: bool = True
    own_leaves: int = 0

    @property
    def results(self) -> tuple[TensorSpec, ...]:
        """The output leaves that are tensors of their own."""
        return tuple(out for out in self.outputs if isinstance(out, TensorSpec))

    @property
    def taken(self) -> tuple[int, ...]:
        """Positions, among arguments and parameters, of those that get a gradient."""
        return tuple(i for i, spec in enumerate(self.gradients) if spec is not None)


@dataclass(slots=True)
class Slots:
    """Arguments and results of a part, there while its backward runs."""

    given: Sequence[torch.Tensor] = ()


@dataclass(slots=True)
class _Packed:
    """A tensor that autograd saved: itself, or its place in an argument or result."""

    tensor: torch.Tensor | None
    slot: int = -1
    geometry: Geometry = ((), (), 0)


@dataclass(slots=True)
class Ticket:
    """The autograd graph of one call of a part.

    Attributes:
        results: where backward starts, per result; None where it does not require grad.
        sources: where gradients come out, per argument and parameter; None where none is wanted.
        slots: where its saved arguments and results are looked up.
    """

    results: list[GradientEdge | None] = field(default_factory=list)
    sources: list[GradientEdge | None] = field(default_factory=list)
    slots: Slots = field(default_factory=Slots)


class _Gate(torch.autograd.Function):
    """An argument as a tensor inside autograd whose gradient can be asked for, without a graph that holds the tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError("internal error: a part's gradient left the part; please report it")


class Part:
    """A submodule and one recorded way of calling it: the two kernels."""

    def __init__(self, module: nn.Module, spec: PartCall) -> None:
        self.module, self.spec = module, spec

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Results, then the Ticket. `tensors`: arguments, parameters, buffers.

        Raises:
            PartError: the output is not of the recorded kind.
        """
        spec = self.spec
        num_arguments, num_weights = len(spec.arguments), len(spec.weights)
        arguments = [gated(t, s.requires_grad and spec.grad) for t, s in zip(tensors, spec.arguments, strict=False)]
        given = tensors[num_arguments : num_arguments + num_weights]
        weights = weight_aliases(spec, given)
        buffers = dict(zip(spec.buffers, tensors[num_arguments + num_weights :], strict=True))
        ticket, results, packed = call_part(self.module, spec, arguments, weights | buffers, self._results)
        if len(foreign_leaves(ticket)) > spec.own_leaves:
            raise PartError(
                f"{spec.module}, which runs as it is, reads a tensor that requires grad and that an earlier call left behind: "
                "eager would differentiate that call once more, a plan cannot. Keep it detached, or train this model unplanned"
            )
        _refer(packed, [*tensors[:num_arguments], *results], spec)
        return (*results, ticket)

    def _results(self, out: Any) -> list[torch.Tensor]:
        leaves, out_spec = pytree.tree_flatten(out)
        spec = self.spec
        if out_spec != spec.call.out_spec:
            raise PartError(f"{spec.module} returned another structure than when it was planned; {_ADVICE}")
        results = []
        for leaf, expected in zip(leaves, spec.outputs, strict=True):
            if isinstance(expected, TensorSpec):
                if not isinstance(leaf, torch.Tensor) or tensor_spec(leaf) != expected:
                    found = str(tensor_spec(leaf)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                    raise PartError(f"{spec.module} returned {found}, and {expected} when it was planned; {_ADVICE}")
                results.append(leaf)
            elif isinstance(expected, tuple) and leaf != expected[0]:
                raise PartError(f"{spec.module} returned {leaf!r}, and {expected[0]!r} when it was planned; {_ADVICE}")
        return results

    def backward(
        self,
        grads: Sequence[torch.Tensor | None],
        ticket: Ticket,
        read: Sequence[torch.Tensor],
        arrived: Sequence[torch.Tensor | None],
        retain: bool = False,
    ) -> list[torch.Tensor | None]:
        """Gradients of what `PartCall.taken` lists; None for a parameter that this call had no use for.

        `read`: what `PartCall.reads` lists (more may follow). `arrived`: per gradient, the sum of what arrived from elsewhere
        before: the engine starts with it, so that everything is added in eager's order. `retain`: the ticket is used again.
        """
        spec = self.spec
        slots: list[Any] = [None] * (len(spec.arguments) + len(spec.results))
        places = (*spec.reads[0], *(len(spec.arguments) + i for i in spec.reads[1]))
        for place, tensor in zip(places, read, strict=False):
            slots[place] = tensor
        wanted = [ticket.sources[i] for i in spec.taken]
        starts = (*zip(ticket.results, grads, strict=True), *zip(wanted, arrived, strict=True))
        roots = [(edge, grad) for edge, grad in starts if edge is not None and grad is not None]
        ticket.slots.given = slots
        try:
            edges, tangents = [edge for edge, _ in roots], [grad for _, grad in roots]
            found = torch.autograd.grad(edges, wanted, tangents, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]
        finally:
            ticket.slots.given = ()
        num_arguments = sum(i < len(spec.arguments) for i in spec.taken)
        if any(grad is None for grad in found[:num_arguments]):
            raise BackwardError(f"an argument of {spec.module} got no gradient, but did when it was planned; {_ADVICE}")
        return list(found)


_ADVICE = "make a larger part opaque: plan(..., opaque=[its parent])"


def weight_aliases(spec: PartCall, weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of the same memory, by name, for one call; no gradient may be accumulated in them."""
    made: dict[str, torch.Tensor] = {
        name: nn.Parameter(t.detach(), grad) for (name, grad), t in zip(spec.weights, weights, strict=True)
    }
    for parameter in made.values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_refuse_inside, spec.module))
    return made


def _refuse_inside(module_name: str, *_: Any) -> None:
    raise BackwardError(
        f"backward came to a tensor that something in {module_name} kept of its inside (an attribute, a hook?); a plan knows "
        "no gradient there. Return that tensor from the model, or keep it detached"
    )


def foreign_leaves(ticket: Ticket) -> list[torch.Tensor]:
    """Tensors that backward from the results would accumulate gradients in, and that are none of the sources."""
    inside = {edge.node for edge in ticket.sources if edge is not None}
    todo, found = [edge.node for edge in ticket.results if edge is not None], []
    while todo:
        node = todo.pop()
        if node not in inside:
            inside.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.append(leaf)
            todo += [following for following, _ in node.next_functions if following is not None]
    return found


def gated(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """The same data as an argument inside autograd."""
    if not requires_grad:
        return tensor.detach()
    with torch.enable_grad():  # a planned forward runs without
        return _Gate.apply(torch.empty(0, requires_grad=True), tensor)  # type: ignore[no-any-return]


def tensor_spec(tensor: torch.Tensor) -> TensorSpec:
    """What is recorded of a tensor."""
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad)


def call_part(
    module: nn.Module,
    spec: PartCall,
    arguments: Sequence[torch.Tensor],
    state: dict[str, torch.Tensor],
    results_of: Callable[[Any], list[torch.Tensor]],
) -> tuple[Ticket, list[torch.Tensor], list[_Packed]]:
    """Run the submodule as eager would: the ticket, the results without autograd, and what autograd saved."""
    leaves = list(spec.call.leaves)
    for position, place in zip(spec.call.tensors, spec.places, strict=True):
        leaves[position] = arguments[place]
    args, kwargs = pytree.tree_unflatten(leaves, spec.call.in_spec)
    ticket, packed = Ticket(), []
    module_name = spec.module
    slots = ticket.slots  # not the ticket itself: it would hold what holds it, beyond the reach of Python's collector

    def pack(tensor: torch.Tensor) -> _Packed:
        packed.append(_Packed(tensor.data))  # a detached one would hold its base, and with that perhaps the graph: a cycle
        return packed[-1]

    def unpack(held: _Packed) -> torch.Tensor:
        if held.tensor is None and not slots.given:
            _refuse_inside(module_name)
        return held.tensor if held.tensor is not None else slots.given[held.slot].as_strided(*held.geometry)

    enabled, dtype = spec.autocast
    device = next(iter((*state.values(), *arguments))).device
    held, weights = _in_every_place(module, state)
    with (
        torch.set_grad_enabled(spec.grad),
        torch.autocast(device.type, dtype, enabled=enabled),
        saved_tensors_hooks(pack, unpack),
    ):
        with weights_put_back(module, weights):
            out = torch.func.functional_call(module, held, args, kwargs, tie_weights=False)
        found = results_of(out)
    if enabled:
        torch.clear_autocast_cache()  # nobody else uses these casts
    for name, tensor in state.items():
        if held[name] is not tensor:  # self.buffer = new
            path, _, attribute = name.rpartition(".")
            module.get_submodule(path)._buffers[attribute] = held[name]
    ticket.results = [get_gradient_edge(t) if t.requires_grad else None for t in found]
    sources = (*arguments, *(state[name] for name, _ in spec.weights))
    ticket.sources = [get_gradient_edge(t) if t.requires_grad else None for t in sources]
    saved = list(packed)
    packed.clear()  # the hooks, which the graph holds, hold this list: with tensors of the graph in it, that would be a cycle
    return ticket, own_storages([t.detach() for t in found]), saved


def _in_every_place(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """The state under the name of each place that holds it, those of shared tensors, too; the module's own tensor by alias.

    A submodule that is registered twice is one place. With both its names, functional_call would leave the given tensors in it.
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


def own_storages(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results, each in a storage of its own that holds nothing else."""
    seen: set[int] = set()
    own = []
    for tensor in results:
        key, extent = storage_id(tensor), tensor_spec(tensor).empty(torch.device("meta")).untyped_storage().nbytes()
        if key in seen or tensor.untyped_storage().nbytes() > extent:
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        seen.add(key)
        own.append(tensor)
    return own


def find_reads(packed: Sequence[_Packed], slots: Sequence[torch.Tensor]) -> list[int]:
    """Which of `slots` autograd saved, wholly or in part."""
    owner = {storage_id(tensor): i for i, tensor in enumerate(slots)}
    saved = {storage_id(p.tensor) for p in packed if p.tensor is not None and _refers(p.tensor, owner, slots)}
    return [i for i, tensor in enumerate(slots) if storage_id(tensor) in saved]


def _refers(tensor: torch.Tensor, owner: dict[int, int], slots: Sequence[torch.Tensor]) -> bool:
    slot = owner.get(storage_id(tensor))
    return slot is not None and tensor.dtype is slots[slot].dtype and not tensor.is_conj() and not tensor.is_neg()


def _refer(packed: Sequence[_Packed], slots: Sequence[torch.Tensor], spec: PartCall) -> None:
    """Let go of saved arguments and results: they come again with the backward."""
    num_arguments = len(spec.arguments)
    readable = {*spec.reads[0], *(num_arguments + i for i in spec.reads[1])}
    owner = {storage_id(tensor): i for i, tensor in enumerate(slots) if i in readable}
    for held in packed:
        if held.tensor is not None and _refers(held.tensor, owner, slots):
            tensor, held.slot = held.tensor, owner[storage_id(held.tensor)]
            held.geometry = (tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
            held.tensor = None
