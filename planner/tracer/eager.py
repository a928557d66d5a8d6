"""The model's own training step on tensors without data: what is live when, as Python and autograd hold it.

The joint graph is in normal form: it has no in-place kernels, and does not know how long a local variable of the forward holds
a tensor. This runs the step itself on a CPU's fake tensors, and follows every storage from the kernel that makes it to its end.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner._compat.dispatch import TorchDispatchMode
from planner._compat.fake_tensors import FakeTensor, stand_ins
from planner._compat.tensors import storage_id
from planner.analysis.estimate import Parts, PlainStep
from planner.errors import CaptureError
from planner.graph.source import NOWHERE, Source
from planner.kernels.calls import tensors_in
from planner.kernels.facts import may_hold_much
from planner.profiler.profile import KernelCost
from planner.tracer.capture import IS_CAPTURING
from planner.tracer.copies import with_left_tensors
from planner.tracer.host.generators import Generators
from planner.tracer.host.state import remembered
from planner.tracer.joint import Joint
from planner.tracer.loss import Loss, loss_leaves
from planner.tracer.user_code import source_here

CallKey = tuple[str, tuple[Any, ...]]
"""A kernel's name without its overload, and shapes and dtypes of the tensors among its arguments."""


def with_tensors(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    make: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]],
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A copy of a model and a call with other tensors; tied tensors stay tied. The model is left as it is.

    Args:
        make: the tensors in place of these, in their order.
    """
    call = (tuple(args), dict(kwargs))
    leaves = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(call))
    given = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
    made: dict[int, Any] = {}
    for old, new in zip(given, make(given), strict=True):
        made[id(old)] = nn.Parameter(new.detach(), old.requires_grad) if isinstance(old, nn.Parameter) else new
    copied = copy.deepcopy(model, with_left_tensors(model, dict(made)))
    return copied, *pytree.tree_map(lambda leaf: made.get(id(leaf), leaf), call)


def eager_step(
    model: nn.Module,
    joint: Joint,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Loss,
    costs: Mapping[CallKey, KernelCost],
    *,
    accumulates: bool = False,
    all_known: bool = True,
) -> PlainStep:
    """The peak of the model's own step, forward and backward, and what is live there; nothing is allocated.

    Autocast is as it is here. Python state and random generators are put back.

    Args:
        joint: the step, as captured on a CPU.
        args, kwargs, loss: as for `capture`.
        costs: workspaces and hidden bytes by call; a call that is missing has none.
        accumulates: parameters have gradients before the step.
        all_known: every module of the model is captured, so `costs` has the kernels that hold much for themselves.

    Raises:
        CaptureError: `all_known` is False, and the step calls a kernel that may hold much for itself and is not in `costs`.
        Exception: what the model or torch raises where a step needs the data of its tensors.
    """
    preserved = remembered(model, joint.host.key)
    token = IS_CAPTURING.set(True)
    try:
        with Generators(joint.device).preserved():
            copied, args, kwargs = with_tensors(model, args, kwargs, stand_ins)
            return _run(copied, args, kwargs, loss, _LiveStorages(costs, all_known), accumulates)
    finally:
        IS_CAPTURING.reset(token)
        preserved.restore()


def _run(model: nn.Module, args: Any, kwargs: Any, loss: Loss, live: _LiveStorages, accumulates: bool) -> PlainStep:
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mode = next(leaf.fake_mode for leaf in (*model.parameters(), *inputs) if isinstance(leaf, FakeTensor))
    with mode, torch.enable_grad():
        for kind, tensors in (("parameters", model.parameters()), ("buffers", model.buffers()), ("inputs", inputs)):
            for tensor in tensors:
                live.hold(tensor, kind)
        for parameter in model.parameters() if accumulates else ():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                live.hold(parameter.grad, "gradients")
        with live:
            out = model(*args, **kwargs)
            leaves = pytree.tree_leaves(out)
            live.end_forward([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            starts = loss_leaves(out, leaves, loss)
            tangents = [torch.ones_like(start) for start in starts]
            live.kind = "temporaries"
            torch.autograd.backward(starts, tangents)
        gradients = [t.grad for t in (*model.parameters(), *inputs) if t.is_leaf and t.grad is not None]
    return live.peak(gradients)


@dataclass(slots=True)
class _Event:
    """A storage begins or ends (negative bytes)."""

    storage: int
    nbytes: int


@dataclass(slots=True)
class _Peak:
    live_bytes: int = 0
    workspace_bytes: int = 0
    after: int = 0
    kernel: str = ""
    source: Source = NOWHERE

    @property
    def nbytes(self) -> int:
        return self.live_bytes + self.workspace_bytes


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that kernels make, while entered.

    Attributes:
        kind: what storages are that are made from now on.
    """

    def __init__(self, costs: Mapping[CallKey, KernelCost], all_known: bool) -> None:
        super().__init__()
        self._all_known = all_known
        self.kind = "activations"
        self._costs = costs
        self._events: list[_Event] = []
        self._kinds: dict[int, str] = {}
        self._alive: dict[int, tuple[Any, int]] = {}
        self._live_bytes, self._made = 0, 0
        self._peak = _Peak()

    def hold(self, tensor: torch.Tensor, kind: str, hidden_bytes: int = 0) -> None:
        """Count a tensor's storage until it ends."""
        identity = storage_id(tensor)
        if identity in self._alive:
            return
        storage, nbytes = tensor.untyped_storage(), tensor.untyped_storage().nbytes() + hidden_bytes
        self._made += 1
        number = self._made

        def ended(_: Any) -> None:
            self._alive.pop(identity, None)
            self._live_bytes -= nbytes
            self._events.append(_Event(number, -nbytes))

        self._alive[identity] = (weakref.ref(storage, ended), number)
        self._kinds[number] = kind
        self._live_bytes += nbytes
        self._events.append(_Event(number, nbytes))

    def end_forward(self, results: Sequence[torch.Tensor]) -> None:
        """Sort what the forward made as `planner.graph.live` does; the gradients of its results are made next."""
        alive = {number for _, number in self._alive.values()}
        for number, kind in self._kinds.items():
            if kind == "activations" and number not in alive:
                self._kinds[number] = "temporaries"
        for tensor in results:
            known = self._alive.get(storage_id(tensor))
            if known is not None and self._kinds[known[1]] == "activations":
                self._kinds[known[1]] = "inputs"
        self.kind = "inputs"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = tensors_in(out)
        cost = self._costs.get(key_of(func, (args, kwargs or {})))
        # What makes no tensor may be a question, for a tensor's device say, which C++ code asks where no error can pass.
        if cost is None and made and not self._all_known and may_hold_much(func):
            raise CaptureError(f"what {func} holds for itself, inside of a module that is not captured, is not known")
        cost = cost or _NO_COST
        for i, tensor in enumerate(made):
            self.hold(tensor, self.kind, cost.hidden_bytes[i] if i < len(cost.hidden_bytes) else 0)
        if self._live_bytes + cost.workspace_bytes > self._peak.nbytes:
            source, _ = source_here("")
            self._peak = _Peak(self._live_bytes, cost.workspace_bytes, len(self._events), _name(func), source)
        return out

    def peak(self, gradients: Sequence[torch.Tensor]) -> PlainStep:
        """The peak so far. `gradients`: those that the step returns, which are alive."""
        returned = {self._alive[storage_id(t)][1] for t in gradients if storage_id(t) in self._alive}
        sizes: dict[int, int] = {}
        for event in self._events[: self._peak.after]:
            sizes[event.storage] = sizes.get(event.storage, 0) + event.nbytes
        totals = dict.fromkeys(("parameters", "buffers", "inputs", "gradients", "activations", "temporaries"), 0)
        for storage, nbytes in sizes.items():
            totals["gradients" if storage in returned else self._kinds[storage]] += nbytes
        totals["temporaries"] += self._peak.workspace_bytes
        parts = Parts(
            **{f"{name}_bytes": nbytes for name, nbytes in totals.items()},
            optimizer_bytes=0,
            reserved_bytes=0,
            workspace_bytes=self._peak.workspace_bytes,
        )
        at = self._peak
        return PlainStep(at.nbytes, parts, f"{at.kernel} ({at.source})" if at.source else at.kernel)


_NO_COST = KernelCost(0, 0)


def _name(func: Any) -> str:
    """A kernel's name without overload; an in-place one's is that of the kernel that makes its result."""
    return str(getattr(func, "overloadpacket", func)).rpartition(".")[2].rstrip("_")


def key_of(func: Any, arguments: Any) -> CallKey:
    """The key of a call; `arguments`: a tree, whose tensors count."""
    leaves = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
    return _name(func), tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
