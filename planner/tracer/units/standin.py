"""What stands in a trace for units: gates around a template, and one kernel forward and one backward for each other unit."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback
from torch import fx

from planner.tracer.units.choice import Form
from planner.tracer.units.kernels import KernelLog

MARK = "planner_unit"
"""Where `meta["custom"]` of a gate's node says which gate it is: (unit, "argument" or "result", position)."""

_LIBRARY = torch.library.Library("checkpoint_planner", "FRAGMENT")  # dropping it would undo the definitions
_LIBRARY.define("unit(Tensor[] tensors, str name) -> Tensor[]")
_LIBRARY.define("unit_backward(Tensor?[] grads, str name) -> Tensor[]")


@dataclass(slots=True, eq=False)
class Kind:
    """Units that run the same kernels.

    Attributes:
        template: the name of the unit that is traced.
        log: its kernels.
        num_arguments: tensors that it is given.
        key: what its arguments look like.
        out_spec, leaves: its output as a tree; tensors by place, other leaves by value.
        results: form and requires_grad of the tensors among the leaves.
        clears: how often autocast's cache had been cleared when it was called.
        members: the other units' calls, by name.
    """

    template: str
    log: KernelLog
    num_arguments: int
    key: Hashable
    out_spec: Any = None
    leaves: list[Any] = field(default_factory=list)
    results: list[tuple[Form, bool]] = field(default_factory=list)
    clears: int = 0
    members: dict[str, UnitCall] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class UnitCall:
    """A call of a unit that has a stand-in.

    Attributes:
        name: the unit's.
        kind: what its results look like.
        wanted: positions of the arguments that get a gradient, and how they look.
        weights: names of its parameters, and which of them are trained.
        clears: how often autocast's cache had been cleared when it was called.
    """

    name: str
    kind: Kind
    wanted: list[tuple[int, Form]]
    weights: list[tuple[str, bool]]
    clears: int = 0


_CALLS: ContextVar[Mapping[str, UnitCall]] = ContextVar("calls of units that have stand-ins")


@torch.library.register_fake("checkpoint_planner::unit", lib=_LIBRARY)
def _fake_unit(tensors: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    return [form.empty() for form, _ in _CALLS.get()[name].kind.results]


@torch.library.register_fake("checkpoint_planner::unit_backward", lib=_LIBRARY)
def _fake_backward(grads: list[Any], name: str) -> list[torch.Tensor]:
    return [form.empty() for _, form in _CALLS.get()[name].wanted]


_FORWARD = torch.ops.checkpoint_planner.unit.default
_BACKWARD = torch.ops.checkpoint_planner.unit_backward.default


@contextmanager
def known(calls: Mapping[str, UnitCall]) -> Iterator[None]:
    """While entered, stand-ins know what their units return."""
    token = _CALLS.set(calls)
    try:
        yield
    finally:
        _CALLS.reset(token)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mark: tuple[str, str, int]) -> torch.Tensor:
        ctx.mark = mark
        ctx.set_materialize_grads(False)
        with torch.fx.traceback.annotate({MARK: mark}):
            return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        if grad is None:
            return None, None
        with torch.fx.traceback.annotate({MARK: ctx.mark}):
            return grad.detach(), None


def gate(tensor: torch.Tensor, unit: str, side: str, position: int) -> torch.Tensor:
    """The same tensor, with a node in the graph to tell where it enters or leaves a template; its gradient likewise."""
    out: torch.Tensor = _Gate.apply(tensor, (unit, side, position))
    return out


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: UnitCall, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = torch.ops.checkpoint_planner.unit(list(tensors), call.name)
        ctx.call, ctx.num_tensors = call, len(tensors)
        ctx.set_materialize_grads(False)
        fixed = [result for result, (_, requires_grad) in zip(results, call.kind.results, strict=True) if not requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        found = torch.ops.checkpoint_planner.unit_backward(list(grads), ctx.call.name)
        handed: list[Any] = [None] * ctx.num_tensors
        for (i, _), grad in zip(ctx.call.wanted, found, strict=True):
            handed[i] = grad
        return (None, *handed)


def stand_in(call: UnitCall, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The results of a unit, of one kernel."""
    results: tuple[torch.Tensor, ...] = _StandIn.apply(call, *arguments)
    return results


def stand_ins(graph: fx.Graph) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
    """The nodes of stand-ins forward and backward, by the unit's name."""
    forward = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=_FORWARD)}
    backward = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=_BACKWARD)}
    return forward, backward


def gates(graph: fx.Graph) -> dict[tuple[str, str, int], list[fx.Node]]:
    """The nodes of every gate, in order: forward, then backward."""
    found: dict[tuple[str, str, int], list[fx.Node]] = {}
    for node in graph.nodes:
        mark = (node.meta.get("custom") or {}).get(MARK)
        if mark is not None and node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            found.setdefault(tuple(mark), []).append(node)
    return found
