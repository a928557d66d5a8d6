"""Python state that calls may find beside the one that was captured: of a first call, and what the training loop has detached.

A step is captured as later calls run: each finds what the one before left. A plan for the other calls is made as theirs, with
the model brought into their state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from planner.captured import CapturedStep
from planner.graph.graph import Kind
from planner.runtime.audit import may_be_written, run_original
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.host.counts import Counts, Number
from planner.tracer.host.fingerprint import Difference
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import contents_preserved
from planner.tracer.host.state import remembered
from planner.verification.step_copy import FILLED_IN, autocast_of, run_first_calls

_MOST_NAMES = 4
_MOST_COUNTED, _MOST_OUTCOMES, _LARGEST = 10_000, 3, 2**63
"""Numbers of calls that are counted on, of further outcomes of comparisons that are planned for, and the largest number."""


def plans_of_other_states(
    step: CapturedStep, planned: CheckpointedModule, plan_for: Callable[[str], CheckpointedModule | None]
) -> list[CheckpointedModule]:
    """Plans for calls that find Python state which the planned module of a captured step is not for.

    Args:
        plan_for: plans the call that the model, in the state that it is in, would do next; given which calls do, None where it
            cannot be planned.
    """
    made: list[CheckpointedModule] = []

    def plan_in(state: AbstractContextManager[None], calls: str) -> CheckpointedModule | None:
        with state:
            with autocast_of(planned), torch.enable_grad():
                known = next((other for other in made if other.mismatch(step.args, step.kwargs) is None), None)
            found = plan_for(calls) if known is None else known
        if found is not None and found is not known:
            made.append(found)
        return found

    with autocast_of(planned), torch.enable_grad():
        mismatch = planned.mismatch(step.args, step.kwargs)
    if mismatch is not None and mismatch.kind in FILLED_IN:
        plan_in(contextlib.nullcontext(), "first calls: Python state is as it was when this was planned")
    if step.joint.host.counts.has_comparisons:
        _plan_other_outcomes(step, planned, plan_in)
    carried = _carried(step, planned)
    if carried:
        names = ", ".join(map(str, carried[:_MOST_NAMES])) + (" and others" if len(carried) > _MOST_NAMES else "")
        plan_in(_detached(step, planned, carried), f"calls that find {names} detached by the training loop")
    return made


PlanIn = Callable[[AbstractContextManager[None], str], CheckpointedModule | None]
"""The plan for the next call in the state of a context, and which calls these are; None where it cannot be planned."""


def _plan_other_outcomes(step: CapturedStep, planned: CheckpointedModule, plan_in: PlanIn) -> None:
    """Plan for the numbers that calls will count to and with which a comparison comes out otherwise than captured.

    The model is not run: what a call counts follows from what it finds, by the plan for it. It is counted on for 10,000 calls,
    or until there are plans for three further outcomes.
    """
    counts = step.joint.host.counts
    known, numbers = [counts], counts.found(step.model)
    if list(map(type, numbers)) != list(map(type, counts.captured)):  # which a first call sets
        numbers = list(counts.captured)
    for _ in range(_MOST_COUNTED):
        left = _left_by(known, numbers)
        if isinstance(left, Difference) and len(known) <= _MOST_OUTCOMES:
            state = _counted(step, planned, numbers)
            other = plan_in(state, f"calls where {left.where} is {left.now}")
            if other is None or other.step.joint.host.counts.places != counts.places:
                return
            known.append(other.step.joint.host.counts)
            left = _left_by(known[-1:], numbers)
        if not isinstance(left, list) or left == numbers or not all(-_LARGEST < number < _LARGEST for number in left):
            return
        numbers = left


def _left_by(known: Sequence[Counts], found: Sequence[Number]) -> list[Number] | Difference | None:
    """What a call leaves that finds these numbers: by the one of these that is for it, or how it differs from the first.

    None where it raises an error.
    """
    try:
        results = [counts.follow(found) for counts in known]
    except Exception:  # of the model's arithmetic
        return None
    return next((left for left in results if isinstance(left, list)), results[0])


@contextlib.contextmanager
def _counted(step: CapturedStep, planned: CheckpointedModule, numbers: Sequence[Number]) -> Iterator[None]:
    """While entered, the model is as after a call, with these numbers in the places where it counts."""
    with _after_calls(step, planned):
        for path, number in zip(step.joint.host.counts.places, numbers, strict=True):
            path.set(step.model, number)
        yield


def _carried(step: CapturedStep, planned: CheckpointedModule) -> list[Path]:
    """Places of tensors that one call leaves with their autograd graph and the next one reads."""
    joint, first = step.joint, len(step.joint.call.tensors)
    differentiated = [int(given.key) for given, _ in joint.gradients if given.kind is Kind.INPUT]
    places = [joint.host.state[i - first] for i in differentiated if i >= first]
    if not places:
        return []
    with _after_calls(step, planned) as is_steady:
        return [path for path in places if is_steady and not _tensor_at(path, step.model).is_leaf]


@contextlib.contextmanager
def _detached(step: CapturedStep, planned: CheckpointedModule, places: list[Path]) -> Iterator[None]:
    """While entered, the model is as after a call, with the tensors at these places detached."""
    host = step.joint.host
    with _after_calls(step, planned):
        for path in (*places, *(path for path, number in host.shared if host.state[number] in places)):
            path.set(step.model, _tensor_at(path, step.model).detach())
        yield


@contextlib.contextmanager
def _after_calls(step: CapturedStep, planned: CheckpointedModule) -> Iterator[bool]:
    """While entered, Python state is as calls of the model leave it; yields whether it is as it was captured."""
    model, joint = step.model, step.joint
    generators = Generators(joint.device).restorers()
    given = joint.call.tensor_leaves(step.args, step.kwargs)
    with contents_preserved(may_be_written(model, joint, given)):
        preserved = remembered(model, joint.host.key)
        try:
            with iterators_copied(), autocast_of(planned), torch.enable_grad():
                with bound_and_restored(step.args, step.kwargs):
                    run_original(unplanned_forward(model), step.args, step.kwargs)
                run_first_calls(planned, (step.args, step.kwargs))
                is_steady = planned.mismatch(step.args, step.kwargs) is None
            yield is_steady
        finally:
            preserved.restore()
            for put_back in generators:
                put_back()


def _tensor_at(path: Path, model: nn.Module) -> torch.Tensor:
    found = path.get(model)
    assert isinstance(found, torch.Tensor), path
    return found
