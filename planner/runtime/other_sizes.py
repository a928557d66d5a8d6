"""Calls of other sizes: one plan for inputs of every size up to the planned one (`dynamic=True`).

A call of smaller inputs is captured when its size first comes. Where it has the planned graph, value by value, and none of its
values is larger, the planned schedule runs it within the planned peak: the peak is a sum of values' bytes (`simulate`) and of
kernels' workspace, which is assumed not to grow as inputs shrink.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import nn

from planner.errors import CaptureError, PlannerError
from planner.graph.graph import Graph
from planner.graph.structure import first_difference, places, renamed, wiring
from planner.log import RUNTIME
from planner.results.plan import Plan
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.step import RewrittenStep, make_step
from planner.tracer.faults import is_fault
from planner.tracer.host.fingerprint import tensor_key
from planner.tracer.lower import lower_like
from planner.tracer.real_layouts import capture
from planner.units import format_bytes

MOST_SIZES = 64
"""Maximum number of sizes that are remembered; then the oldest is dropped."""

Planned = TypeVar("Planned")


class OtherSizes(Generic[Planned]):
    """Planned modules for calls of other sizes.

    Attributes:
        known: per size, the planned module, or why there is none.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Planned | Mismatch] = {}

    def find(
        self,
        step: RewrittenStep,
        plan: Plan,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any],
        make: Callable[[RewrittenStep], Planned],
    ) -> Planned | Mismatch:
        """The planned module for this call's size, made by `make` when the size first comes; or why there is none."""
        size = call_sizes(step, args, kwargs)
        if size not in self.known:
            if len(self.known) >= MOST_SIZES:
                del self.known[next(iter(self.known))]
            try:
                self.known[size] = make(step_of_other_size(step, plan, model, args, kwargs))
            except PlannerError as error:
                if is_fault(error):
                    raise
                RUNTIME.warning("inputs of another size, which run unplanned: %s", error)
                self.known[size] = Mismatch("input", "the inputs' shape", text=str(error))
        return self.known[size]


def call_sizes(step: RewrittenStep, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Shape, strides, dtype, device and requires_grad of each tensor of the call."""
    return tuple(tensor_key(tensor) for tensor in step.joint.call.tensor_leaves(args, kwargs))


def step_of_other_size(
    step: RewrittenStep, plan: Plan, model: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> RewrittenStep:
    """The planned schedule for a call of smaller inputs.

    Raises:
        CaptureError: an input is larger than planned, or has another dtype; or the call's graph is not the planned one.
    """
    for i, (now, planned) in enumerate(zip(call_sizes(step, args, kwargs), step.key.inputs, strict=True)):
        shape, _, *kind = now
        most, _, *expected = planned
        if kind != expected:
            raise CaptureError(f"input {i} is of another dtype, device or requires_grad")
        if len(shape) != len(most) or any(n > m for n, m in zip(shape, most, strict=True)):
            raise CaptureError(f"input {i} is {list(shape)}; this dynamic plan covers up to {list(most)}")
    assert step.recapture is not None
    begun = time.monotonic()
    joint = capture(model, args, kwargs, loss=step.recapture.loss, opaque=step.recapture.opaque)
    graph = lower_like(joint, plan.graph)
    _check_smaller(plan.graph, graph)
    plan = replace(plan, graph=renamed(plan.graph, graph))
    made = make_step(plan, joint, model, args, kwargs, step.num_stages, is_compiled=step.is_compiled)
    shapes = ", ".join(str(list(shape)) for shape, *_ in made.key.inputs)
    RUNTIME.info("inputs of shapes %s: captured in %.1f s, and planned from now on", shapes, time.monotonic() - begun)
    return made


def _check_smaller(planned: Graph, graph: Graph) -> None:
    """Raise CaptureError unless the graph has the planned wiring, and no value is larger and no op less recomputable."""
    if wiring(planned) != wiring(graph):
        raise CaptureError(f"at these inputs' shapes its graph is another one: {first_difference(planned, graph)}")
    for ours, theirs in zip(planned.ops, graph.ops, strict=True):
        if ours.recomputable > theirs.recomputable:
            raise CaptureError(f"{theirs.name} cannot be recomputed at this size ({theirs.source})")
    for one, other in zip(places(planned), places(graph), strict=True):
        now, then = graph.value[other].nbytes, planned.value[one].nbytes
        if now > then:
            raise CaptureError(f"{other} takes {format_bytes(now)}, more than the planned {format_bytes(then)}")
