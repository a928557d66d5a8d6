"""What autograd saves in an opaque module's forward, and the handle by which a plan holds it until the backward.

The module's own arguments and results are not held by the handle: the backward kernel receives them as inputs, so that a plan
may free and recompute them like any other value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge

from planner._compat.tensors import storage_id
from planner.tracer.opaque.call import OpaqueCall, TensorSpec


@dataclass(slots=True)
class Slots:
    """The module's arguments and results, filled while its backward runs."""

    given: Sequence[torch.Tensor] = ()


@dataclass(slots=True)
class SavedTensor:
    """A tensor that autograd saved: itself, or its place in an argument or result.

    Attributes:
        tensor: None where `slot` stands for it.
        slot: position among arguments, then results.
        geometry: (shape, strides, storage offset) in the slot's storage.
    """

    tensor: torch.Tensor | None
    slot: int = -1
    geometry: tuple[tuple[int, ...], tuple[int, ...], int] = ((), (), 0)


@dataclass(slots=True)
class SavedHandle:
    """The autograd graph of one call of an opaque module.

    Attributes:
        results: where backward starts, per result; None where it does not require grad.
        sources: where gradients come out, per argument and parameter; None where none is wanted.
        slots: where saved arguments and results are looked up.
        saved_bytes: of the saved tensors, those aside that are arguments, results, parameters or buffers.
    """

    results: list[GradientEdge | None] = field(default_factory=list)
    sources: list[GradientEdge | None] = field(default_factory=list)
    slots: Slots = field(default_factory=Slots)
    saved_bytes: int = 0


def saving_hooks(
    slots: Slots, refuse: Callable[[], None]
) -> tuple[list[SavedTensor], Callable[[torch.Tensor], SavedTensor], Callable[[SavedTensor], torch.Tensor]]:
    """(list of what is saved, pack hook, unpack hook) for `torch.autograd.graph.saved_tensors_hooks`.

    Args:
        slots: not the handle, which would hold the graph that holds it: a cycle that Python's collector cannot see.
        refuse: raises; called where a saved tensor is wanted outside of the module's own backward.
    """
    saved: list[SavedTensor] = []

    def pack(tensor: torch.Tensor) -> SavedTensor:
        saved.append(SavedTensor(tensor.data))  # a detached one would hold its base, and with that perhaps the graph: a cycle
        return saved[-1]

    def unpack(held: SavedTensor) -> torch.Tensor:
        if held.tensor is None and not slots.given:
            refuse()
        return held.tensor if held.tensor is not None else slots.given[held.slot].as_strided(*held.geometry)

    return saved, pack, unpack


def foreign_leaves(handle: SavedHandle) -> list[torch.Tensor]:
    """Tensors that backward from the results would accumulate gradients in, and that are none of the sources."""
    inside = {edge.node for edge in handle.sources if edge is not None}
    todo, found = [edge.node for edge in handle.results if edge is not None], []
    while todo:
        node = todo.pop()
        if node not in inside:
            inside.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.append(leaf)
            todo += [following for following, _ in node.next_functions if following is not None]
    return found


def used_several_times(handle: SavedHandle) -> frozenset[int]:
    """Positions of the sources whose gradient is a sum: several operations, or calls of one, lead to them."""
    counts = {(edge.node, edge.output_nr): 0 for edge in handle.sources if edge is not None}
    todo, seen = [edge.node for edge in handle.results if edge is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for edge in node.next_functions:
            if edge in counts:
                counts[edge] += 1
            elif edge[0] is not None:
                todo.append(edge[0])
    several = [edge for edge, count in counts.items() if count > 1]
    return frozenset(i for i, edge in enumerate(handle.sources) if edge is not None and (edge.node, edge.output_nr) in several)


def own_storages(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results, each in a storage of its own that holds nothing else."""
    seen: set[int] = set()
    own = []
    for tensor in results:
        key, extent = storage_id(tensor), TensorSpec.of(tensor).empty(torch.device("meta")).untyped_storage().nbytes()
        if key in seen or tensor.untyped_storage().nbytes() > extent:
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        seen.add(key)
        own.append(tensor)
    return own


def find_reads(saved: Sequence[SavedTensor], slots: Sequence[torch.Tensor]) -> list[int]:
    """Positions of the `slots` (arguments, then results) that autograd saved, wholly or in part."""
    owner = {storage_id(tensor): i for i, tensor in enumerate(slots)}
    storages = {storage_id(s.tensor) for s in saved if s.tensor is not None and _is_in_slot(s.tensor, owner, slots)}
    return [i for i, tensor in enumerate(slots) if storage_id(tensor) in storages]


def _is_in_slot(tensor: torch.Tensor, owner: dict[int, int], slots: Sequence[torch.Tensor]) -> bool:
    slot = owner.get(storage_id(tensor))
    return slot is not None and tensor.dtype is slots[slot].dtype and not tensor.is_conj() and not tensor.is_neg()


def held_bytes(saved: Sequence[SavedTensor], given: Sequence[torch.Tensor]) -> int:
    """Bytes of the saved tensors' storages, but for those of the tensors that were `given`."""
    known = {storage_id(tensor) for tensor in given}
    tensors = (held.tensor for held in saved if held.tensor is not None and held.tensor.layout is torch.strided)
    own = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for storage, nbytes in own.items() if storage not in known)


def release_slots(saved: Sequence[SavedTensor], slots: Sequence[torch.Tensor], spec: OpaqueCall) -> None:
    """Drop saved arguments and results, which the backward kernel receives as inputs."""
    num_arguments = len(spec.arguments)
    readable = {*spec.reads[0], *(num_arguments + i for i in spec.reads[1])}
    owner = {storage_id(tensor): i for i, tensor in enumerate(slots) if i in readable}
    for held in saved:
        if held.tensor is not None and _is_in_slot(held.tensor, owner, slots):
            tensor, held.slot = held.tensor, owner[storage_id(held.tensor)]
            held.geometry = (tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))
            held.tensor = None
