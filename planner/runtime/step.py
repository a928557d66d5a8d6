"""Step: a rewritten training step without the model, as it travels in copies and pickles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from planner.results.plan import Plan
from planner.rewriter import portable
from planner.rewriter.partition import Halves, partition
from planner.runtime.backward_key import BackwardKey, captured_key
from planner.runtime.guards import call
from planner.tracer.joint import Joint

DEFAULT_STAGES = 8


@dataclass(frozen=True, slots=True)
class Recapture:
    """How to capture the step again, for inputs of other sizes: the options of `planner.tracer.capture`."""

    loss: Any = None
    opaque: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """Everything a planned call needs besides the model: no parameter, no buffer.

    Attributes:
        joint: how calls map onto the graphs.
        halves: the rewritten forward and backward.
        key: what they are right for.
        num_stages: in how many parts the backward returns gradients, at most.
        recapture: set where the plan is to hold for smaller inputs too.
        is_compiled: inductor compiles the halves wherever they are to run.
        backward_key: what the backward is right for; by default, what the joint graph was captured for.
        same_inputs: per tensor leaf of the call, the first leaf that was the same tensor; by default, each is its own.
        fraction: the budget, where it was given as a fraction of the plain step's peak.
    """

    joint: Joint
    halves: Halves
    key: call.CallKey
    num_stages: int = DEFAULT_STAGES
    recapture: Recapture | None = None
    is_compiled: bool = False
    backward_key: BackwardKey = ()
    same_inputs: tuple[int, ...] = ()
    fraction: float | None = None

    def __post_init__(self) -> None:
        if not self.backward_key:
            object.__setattr__(self, "backward_key", captured_key(self.joint))
        if not self.same_inputs:
            object.__setattr__(self, "same_inputs", tuple(range(len(self.key.inputs))))

    def __reduce__(self) -> tuple[Any, ...]:
        joint, halves = self.joint, self.halves
        graphs = (joint.graph, joint.guards, halves.forward, halves.backward)
        rows = tuple(None if graph is None else portable.to_rows(graph, looks=self.is_compiled) for graph in graphs)
        bare = (replace(joint, graph=None, guards=None), replace(halves, forward=None, backward=None))  # type: ignore[arg-type]
        plain = (self.key, self.num_stages, self.recapture, self.is_compiled)
        return _restore_step, (*bare, rows, *plain, self.backward_key, self.same_inputs, self.fraction)


def _restore_step(
    joint: Joint,
    halves: Halves,
    rows: Sequence[Any],
    *plain: Any,
) -> Step:
    graph, guards, forward, backward = (None if row is None else portable.from_rows(row) for row in rows)
    return Step(
        replace(joint, graph=graph, guards=guards),  # type: ignore[arg-type]
        replace(halves, forward=forward, backward=backward),  # type: ignore[arg-type]
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
) -> Step:
    """The captured step, rewritten by a plan whose graph is its own."""
    halves = partition(joint, plan.graph, plan.solution.schedule)
    tensors = joint.call.tensor_leaves(tuple(args), dict(kwargs or {}))
    key = call.call_key(tensors, joint)
    same = tuple(next(j for j, other in enumerate(tensors) if other is tensor) for tensor in tensors)
    return Step(joint, halves, key, num_stages, recapture, is_compiled, same_inputs=same, fraction=fraction)
