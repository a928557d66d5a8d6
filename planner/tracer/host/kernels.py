"""What kernels a recording forward runs, and what it reads and writes from outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from planner._collectives import collectives_forbidden
from planner._torch import OpOverload, TorchDispatchMode, pytree, storage_id, written
from planner.profiler.observed import is_foreign
from planner.tracer.collectives import alone

HOST_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
"""Kernels that hand a tensor's value to Python."""


Read = tuple[str, bool | int | float | complex]


@dataclass
class Run:
    """One recording forward.

    Attributes:
        kernels: what was run: (operator, submodule, arguments without data).
        reads: every tensor value that Python read, in order.
        outside: tensors that kernels read and nobody in the forward made: weights, inputs, and Python state.
    """

    kernels: list[tuple[Any, ...]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    outside: dict[int, torch.Tensor] = field(default_factory=dict)


class RecordKernels(TorchDispatchMode):
    """Fills a Run; what happens while `paused` (inside opaque submodules) is left out."""

    def __init__(self, where: Callable[[], str], apart: Callable[[], AbstractContextManager[None]]) -> None:
        """`apart`: context entered while an operator that is not torch's runs; its Python code is not recorded."""
        super().__init__()
        self._where, self._apart = where, apart
        self._made: dict[int, torch.Tensor] = {}
        self._contents: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.run = Run()
        self.paused = False
        self.generator_at = ""

    def new_run(self) -> Run:
        """Begin another run."""
        self.run, self._made = Run(), {}
        return self.run

    @property
    def has_swapped_data(self) -> bool:
        """A tensor that was there before has been given other memory (`tensor.data = other`)."""
        return any(storage_id(tensor) != storage_id(data) for tensor, data in self._data.values())

    def restore_contents(self) -> None:
        """Put back what kernels wrote into tensors that were there before."""
        with torch.no_grad():
            for tensor, data in self._data.values():
                if storage_id(tensor) != storage_id(data):
                    tensor.data = data
            for tensor, content in self._contents.values():
                tensor.copy_(content)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if not self.paused:
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and id(leaf) not in self._made and id(leaf) not in self.run.outside:
                    self.run.outside[id(leaf)] = leaf
                    if leaf.layout is torch.strided:
                        self._storages.setdefault(storage_id(leaf), leaf)
                        self._data.setdefault(id(leaf), (leaf, leaf.detach()))
                elif isinstance(leaf, torch.Generator):
                    self.generator_at = self.generator_at or self._where() or "the model"
            self.run.kernels.append((str(func), self._where(), *map(_described, leaves)))
        if isinstance(func, OpOverload):
            self._keep_written(func, args, kwargs or {})
        if is_foreign(func) and not self.paused:
            with self._apart():
                result = _without_communication(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor) and id(made) not in self.run.outside:
                self._made[id(made)] = made
        if func in HOST_READS and not self.paused:
            self.run.reads.append((str(func), result))
        return result

    def _keep_written(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        for tensor in written(func, args, kwargs):
            base = None
            if tensor.layout is torch.strided:
                base = self._storages.get(storage_id(tensor))  # it may be a view that is written through
            if base is not None and id(base) not in self._contents:
                self._contents[id(base)] = (base, base.detach().clone())


def _without_communication(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operator; where it communicates, which is forbidden here, return tensors of the right shapes instead."""
    with collectives_forbidden() as refused:
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if not refused:
                raise
    return alone(func, args, kwargs)


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.requires_grad)
    return repr(leaf) if not callable(leaf) else ""
