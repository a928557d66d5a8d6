"""One plan for inputs of every size up to the planned one.

A step on smaller inputs is captured when its shape is first met. Where it has the planned graph, value by value, and none of
its values is larger, the planned schedule runs it within the planned peak: the peak is a sum of values' bytes (`simulate`) and
kernels' workspace, which is taken not to grow as inputs shrink.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from planner.errors import CaptureError
from planner.graph.graph import Graph
from planner.graph.structure import first_difference, places, renamed, wiring
from planner.log import RUNTIME
from planner.results.plan import Plan
from planner.runtime.step import Step, make_step
from planner.tracer.host.fingerprint import tensor_key
from planner.tracer.lower import lower
from planner.tracer.settled import capture

MOST_SHAPES = 64
"""So many are remembered; then the oldest is forgotten."""


def call_shapes(step: Step, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What tells calls of one structure apart."""
    return tuple(tensor_key(tensor) for tensor in step.joint.call.tensor_leaves(args, kwargs))


def step_of_other_shape(step: Step, plan: Plan, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Step:
    """The planned schedule on a call of smaller inputs.

    Raises:
        CaptureError: an input is larger than planned, or of another kind; or the call's graph is not the planned one.
    """
    for i, (now, planned) in enumerate(zip(call_shapes(step, args, kwargs), step.key.inputs, strict=True)):
        shape, _, *kind = now
        most, _, *expected = planned
        if kind != expected:
            raise CaptureError(f"input {i} is of another dtype, device or requires_grad")
        if len(shape) != len(most) or any(n > m for n, m in zip(shape, most, strict=True)):
            raise CaptureError(f"input {i} is {list(shape)}, the plan holds up to {list(most)}")
    assert step.recapture is not None
    begun = time.monotonic()
    joint = capture(model, args, kwargs, loss=step.recapture.loss, opaque=step.recapture.opaque)
    graph = lower(joint)
    _check_smaller(plan.graph, graph)
    plan = replace(plan, graph=renamed(plan.graph, graph))
    made = make_step(plan, joint, model, args, kwargs, step.num_stages, is_compiled=step.is_compiled)
    shapes = ", ".join(str(list(shape)) for shape, *_ in made.key.inputs)
    RUNTIME.info("inputs of shapes %s: captured in %.1f s, and planned from now on", shapes, time.monotonic() - begun)
    return made


def _check_smaller(planned: Graph, graph: Graph) -> None:
    """Raise CaptureError unless the graph has the planned wiring, and nothing in it is larger or less often recomputable."""
    if wiring(planned) != wiring(graph):
        raise CaptureError(f"its graph is another one: {first_difference(planned, graph)}")
    for ours, theirs in zip(planned.ops, graph.ops, strict=True):
        if ours.recomputable > theirs.recomputable:
            raise CaptureError(f"{theirs.name} cannot be run again here ({theirs.source})")
    for one, other in zip(places(planned), places(graph), strict=True):
        if graph.value[other].nbytes > planned.value[one].nbytes:
            raise CaptureError(f"{other} takes {graph.value[other].nbytes} bytes, more than planned")
