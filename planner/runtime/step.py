"""RewrittenStep: a planned training step without the model's tensors; copies and pickles of planned modules hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from planner.results.plan import Plan
from planner.rewriter import portable
from planner.rewriter.partition import PartitionedStep, partition
from planner.runtime.backward_key import BackwardKey, captured_key
from planner.runtime.guards.call_key import CallKey, call_key, same_tensors, shared_storages
from planner.tracer.joint import Joint

DEFAULT_STAGES = 8


@dataclass(frozen=True, slots=True)
class Recapture:
    """How calls of other sizes are captured and planned.

    Attributes:
        loss, opaque: as for `planner.tracer.real_layouts.capture`.
        plan: plans a captured call that no schedule fits: (model, args, kwargs, joint, the plan whose budget holds) -> the
            planned module. None: such calls run unplanned.
        progress: a line on stderr says what was captured.
    """

    loss: Any = None
    opaque: tuple[str, ...] = ()
    plan: Callable[[nn.Module, Any, Mapping[str, Any], Joint, Plan], Any] | None = None
    progress: bool = False


@dataclass(frozen=True, slots=True)
class RewrittenStep:
    """Everything that a planned call needs besides the model; holds no parameter and no buffer.

    Attributes:
        joint: the captured step; says how a call's tensors map onto the graphs' inputs.
        partitioned: the forward and the backward graph.
        key: the calls that the graphs are right for.
        num_stages: the backward returns gradients in at most this many stages.
        recapture: not None where calls of other sizes are planned as they come (`dynamic=True`).
        is_compiled: inductor compiles the graphs (`compile=True`).
        backward_key: the gradients that the backward graph is right for; by default those of the capture.
        same_inputs: per tensor leaf of the call, the first leaf that was the same tensor; by default its own position.
        storages: per tensor leaf of the call, the first leaf in the same storage; by default its own position.
        fraction: the budget as a fraction of the plain step's peak, where it was given as one.
    """

    joint: Joint
    partitioned: PartitionedStep
    key: CallKey
    num_stages: int = DEFAULT_STAGES
    recapture: Recapture | None = None
    is_compiled: bool = False
    backward_key: BackwardKey = ()
    same_inputs: tuple[int, ...] = ()
    fraction: float | None = None
    storages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.backward_key:
            object.__setattr__(self, "backward_key", captured_key(self.joint))
        if not self.same_inputs:
            object.__setattr__(self, "same_inputs", tuple(range(len(self.key.inputs))))
        if not self.storages:
            object.__setattr__(self, "storages", tuple(range(len(self.key.inputs))))

    def __reduce__(self) -> tuple[Any, ...]:
        joint, partitioned = self.joint, self.partitioned
        graphs = (joint.graph, joint.guards, partitioned.forward, partitioned.backward)
        rows = tuple(None if graph is None else portable.to_rows(graph, with_specs=self.is_compiled) for graph in graphs)
        bare = (replace(joint, graph=None, guards=None), replace(partitioned, forward=None, backward=None))  # type: ignore[arg-type]
        plain = (self.key, self.num_stages, self.recapture, self.is_compiled)
        return _restore_step, (*bare, rows, *plain, self.backward_key, self.same_inputs, self.fraction, self.storages)


def _restore_step(
    joint: Joint,
    partitioned: PartitionedStep,
    rows: Sequence[Any],
    *plain: Any,
) -> RewrittenStep:
    graph, guards, forward, backward = (None if row is None else portable.from_rows(row) for row in rows)
    return RewrittenStep(
        replace(joint, graph=graph, guards=guards),  # type: ignore[arg-type]
        replace(partitioned, forward=forward, backward=backward),  # type: ignore[arg-type]
        *plain,
    )


def make_step(
    plan: Plan,
    joint: Joint,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    num_stages: int,
    recapture: Recapture | None = None,
    is_compiled: bool = False,
    fraction: float | None = None,
) -> RewrittenStep:
    """The captured step, rewritten by a plan whose graph is its own."""
    partitioned = partition(joint, plan.graph, plan.solution.schedule)
    tensors = joint.call.tensor_leaves(tuple(args), dict(kwargs or {}))
    key = call_key(tensors, joint)
    same = same_tensors(tensors)
    return RewrittenStep(
        joint,
        partitioned,
        key,
        num_stages,
        recapture,
        is_compiled,
        same_inputs=same,
        fraction=fraction,
        storages=shared_storages(tensors),
    )
