"""The kernels that a recording forward runs, and the tensors from before it that they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.collectives import collectives_forbidden
from planner._compat.dispatch import OpOverload, TorchDispatchMode, untraced, written
from planner._compat.tensors import is_dense, storage_id
from planner.errors import CaptureError
from planner.kernels.batch_norm import written_statistics
from planner.kernels.observed import is_foreign
from planner.tracer.collectives import alone
from planner.tracer.host.arguments import WrittenArguments
from planner.tracer.host.restorers import form_of, memory_of, restore_tensors, same_bits, unguarded_of
from planner.tracer.host.state import Effect

HOST_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
"""Kernels that return a tensor's value to Python: host reads."""

_NO_TENSORS = frozenset({int, float, bool, str, torch.dtype, torch.device, torch.layout, type(None)})
"""Classes of arguments of kernels that neither are nor hold tensors or generators: most of those that are no tensors."""

RecordedRead = tuple[str, bool | int | float | complex]
"""(kernel, value) of one host read."""


@dataclass
class Run:
    """One recording forward.

    Attributes:
        weights: the model's parameters and buffers when it began, by identity; a forward may put others in their places.
        kernels: what was run: (operator, submodule, arguments without data).
        reads: every tensor value that Python read, in order.
        outside: tensors that kernels read and the forward did not make: weights, inputs, and Python state.
        written: what it wrote into lists and dictionaries among its arguments; the templates hold its tensors.
        arguments: what remembers these; None until the run has ended.
    """

    weights: Mapping[int, torch.Tensor] = field(default_factory=dict)
    kernels: list[tuple[Any, ...]] = field(default_factory=list)
    reads: list[RecordedRead] = field(default_factory=list)
    outside: dict[int, torch.Tensor] = field(default_factory=dict)
    written: tuple[Effect, ...] = ()
    arguments: WrittenArguments | None = None


class RecordKernels(TorchDispatchMode):
    """Fills a Run; what happens while `paused` (inside opaque modules) is left out."""

    def __init__(self, where: Callable[[], str], unrecorded: Callable[[], AbstractContextManager[None]]) -> None:
        """`unrecorded`: context entered while an operator that is not torch's runs; its Python code is not recorded."""
        super().__init__()
        self._where, self._unrecorded = where, unrecorded
        self._made: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()  # which keeps no activation alive
        self._lifted: dict[int, torch.Tensor] = {}  # made of Python's numbers or numpy's arrays
        self._contents: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._flags: list[tuple[torch.Tensor, bool]] = []
        self._at_start: dict[int, object] = {}
        self._written_unrecorded: dict[int, torch.Tensor] = {}
        self._shared_unrecorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._graphs_refused: tuple[str, frozenset[int]] | None = None
        self.run = Run()
        self._paused = False
        self.generator_at: str | None = None  # the submodule that first drew from a torch.Generator of its own

    @property
    def paused(self) -> bool:
        """An opaque module is running."""
        return self._paused

    @paused.setter
    def paused(self, now: bool) -> None:
        if now and not self._paused:
            self._written_unrecorded, self._shared_unrecorded = {}, []
        self._paused = now

    def new_run(self, weights: Sequence[torch.Tensor]) -> Run:
        """Begin another run, of a model that holds these."""
        self.run = Run({id(tensor): tensor for tensor in weights})
        self._made, self._lifted = WeakValueDictionary(), {}
        self._at_start = {key: memory_of(tensor) for key, (tensor, _) in self._data.items()}
        return self.run

    def know(self, weights: Sequence[torch.Tensor], others: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
        """Remember the memory of the model's tensors, which of its weights require grad, and what `written` hold."""
        with untraced():
            self._contents |= {id(tensor): (tensor, tensor.detach().clone()) for tensor in written}
        self._flags += [(tensor, tensor.requires_grad) for tensor in weights if tensor.is_leaf]
        self._data |= {id(t): (t, t.detach()) for t in (*weights, *others) if is_dense(t)}

    @property
    def has_swapped_data(self) -> bool:
        """The last run gave other memory to a tensor that was there before (`tensor.data = other`), or another form."""
        return any(memory_of(tensor) != self._at_start.get(key, memory_of(data)) for key, (tensor, data) in self._data.items())

    @property
    def has_unguarded_changes(self) -> bool:
        """A tensor from before the forward is lazily conjugated or negated now, or has another offset: guards miss that."""
        return any(unguarded_of(tensor) != unguarded_of(data) for tensor, data in self._data.values())

    def restore_contents(self, *, forms: bool) -> None:
        """Put back what kernels wrote into tensors that were there before, and their memory.

        `forms`: also of those whose dtype, shape or strides the first run changed. Until the capture ends they stay as the
        planned call will find them; the weights that a plan is for are compared by these.
        """
        with torch.no_grad():
            for tensor, data in self._data.values():
                if memory_of(tensor) != memory_of(data) and (forms or form_of(tensor) == form_of(data)):
                    tensor.data = data
            for tensor, required in reversed(self._flags):
                if not tensor.is_leaf:  # a graph of ours was written into it
                    tensor.detach_()
                if tensor.requires_grad != required:
                    tensor.requires_grad_(required)
            # the last one first: tensors that runs make of one numpy array share its memory
            restore_tensors(reversed(self._contents.values()))

    @property
    def written(self) -> tuple[torch.Tensor, ...]:
        """The tensors that were there before and that kernels wrote into."""
        return tuple(tensor for tensor, _ in self._contents.values())

    def has_made(self, tensor: torch.Tensor) -> bool:
        """The forward made this tensor; it was not there before."""
        return id(tensor) in self._made or id(tensor) in self._lifted

    def wrote_outside(self, module: nn.Module) -> bool:
        """Since the pause began, tensors were written into that were there before and are not the module's own weights."""
        own = {storage_id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        shared = any(not same_bits(tensor, content) for tensor, content in self._shared_unrecorded)
        return shared or bool(self._written_unrecorded.keys() - own)

    @contextmanager
    def refusing_graphs_from_outside(self, name: str, given: Sequence[torch.Tensor]) -> Iterator[None]:
        """While entered, refuse tensors of an autograd graph that the forward has not made, but for `given`.

        Raises:
            CaptureError: the opaque module `name` reads one: a gradient would leave it there, of which a plan knows nothing.
        """
        self._graphs_refused = (name, frozenset(map(id, given)))
        try:
            yield
        finally:
            self._graphs_refused = None

    def note_call(self, name: str, spec: Any, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Note a call of an opaque module as that of a kernel; a description of its arguments without their data."""
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self._made and id(leaf) not in self.run.outside:
                self._meet(leaf)
        arguments = (str(spec), *map(_described, leaves))
        self.run.kernels.append((f"the call of {name}", self._where(), *arguments))
        return arguments

    def share(self, tensor: torch.Tensor) -> None:
        """Note that numpy gets a tensor's memory: writes by numpy are not recorded."""
        base = self._storages.get(storage_id(tensor)) if is_dense(tensor) else None
        if base is None and id(tensor) not in self._made:
            base = tensor
        if base is not None:
            content = base.detach().clone()
            self._contents.setdefault(id(base), (base, content))
            if self._paused:
                self._shared_unrecorded.append((base, content))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = _leaves((*args, *(kwargs or {}).values()))
        if self._paused and func is torch.ops.aten.lift_fresh.default and leaves[0].untyped_storage().resizable():
            self._made[id(leaves[0])] = leaves[0]  # memory of its own: not numpy's
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in self._made and id(leaf) not in self.run.outside:
                    self._meet(leaf)
            elif type(leaf) not in _NO_TENSORS and isinstance(leaf, torch.Generator) and not self.paused:
                self.generator_at = self._where() if self.generator_at is None else self.generator_at
        if not self.paused:
            self.run.kernels.append((str(func), self._where(), *map(_described, leaves)))
        if func is torch.ops.aten.lift_fresh.default and not self._paused:  # that is its argument
            self._lifted |= {id(leaf): leaf for leaf in leaves}
        if isinstance(func, OpOverload):
            self._keep_written(func, args, kwargs or {})
        if is_foreign(func) and not self.paused:
            with self._unrecorded():
                result = _without_communication(func, args, kwargs or {})
        else:
            result = func(*args, **(kwargs or {}))
        for made in _leaves((result,)):
            if isinstance(made, torch.Tensor) and id(made) not in self.run.outside:
                self._made[id(made)] = made
        if func in HOST_READS and not self.paused:
            self.run.reads.append((str(func), result))
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        """Note a tensor that the forward has not made."""
        if is_dense(tensor):
            self._storages.setdefault(storage_id(tensor), tensor)
        if not self._paused:
            self.run.outside[id(tensor)] = tensor
            if is_dense(tensor):
                self._data.setdefault(id(tensor), (tensor, tensor.detach()))
        elif self._graphs_refused is not None and tensor.grad_fn is not None and id(tensor) not in self._graphs_refused[1]:
            raise graph_from_outside(self._graphs_refused[0])

    def _keep_written(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        for tensor in (*written(func, args, kwargs), *written_statistics(func, args)):
            base = None
            if is_dense(tensor):
                base = self._storages.get(storage_id(tensor))  # it may be a view that is written through
            if base is not None:
                if self._paused:
                    self._written_unrecorded[storage_id(base)] = base
                if id(base) not in self._contents:
                    self._contents[id(base)] = (base, base.detach().clone())
                    self._flags += [(base, base.requires_grad)] if base.is_leaf else []


def _leaves(values: Sequence[Any]) -> list[Any]:
    """The leaves of a kernel's arguments or results, most of which are tensors."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += _leaves(value)
        else:
            found += [value] if type(value) in _NO_TENSORS else pytree.tree_leaves(value)
    return found


def graph_from_outside(name: str) -> CaptureError:
    """The refusal of an opaque module that reads a differentiable tensor which is not among its arguments."""
    return CaptureError(
        f"{name}, which runs as it is, reads a tensor that requires grad and is neither an argument nor one of its parameters "
        "(one that an earlier call left, or another module's): a plan knows no gradient there. Hand it in as an "
        "argument, register it as a parameter, or keep it detached",
        module=name,
    )


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
        return (None if leaf.is_nested else leaf.shape, leaf.dtype, leaf.requires_grad)
    return repr(leaf) if not callable(leaf) else ""
