"""Python state that calls may find beside the one that was captured: of a first call, and what the training loop has detached.

A step is captured as later calls run: each finds what the one before left. A plan for the other calls is made as theirs, with
the model brought into their state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.captured import CapturedStep
from planner.graph.graph import Kind
from planner.runtime.audit import may_be_written, run_original
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.host.counts import Counts, evaluated, read_counts
from planner.tracer.host.generators import Generators
from planner.tracer.host.iterators import iterators_copied
from planner.tracer.host.path import Path
from planner.tracer.host.preserve import contents_preserved
from planner.tracer.host.state import remembered
from planner.verification.step_copy import FILLED_IN, autocast_of, run_first_calls

_MOST_NAMES = 4
_MOST_COUNTED, _MOST_OUTCOMES, _LARGEST = 10_000, 3, 2**63
"""Numbers of calls that are counted on, of further outcomes of comparisons that are planned for, and the largest number."""


@dataclass(frozen=True, slots=True)
class OtherState:
    """Python state that some calls find.

    Attributes:
        calls: which calls do.
        entering: a context in which the model is in that state; entered once.
    """

    calls: str
    entering: AbstractContextManager[None]


def other_states(step: CapturedStep, planned: CheckpointedModule, others: Sequence[CheckpointedModule]) -> Iterator[OtherState]:
    """The states that calls of a captured step may find, and that its planned module is not for.

    Args:
        others: the plans made so far for states that were yielded.
    """
    with autocast_of(planned), torch.enable_grad():
        mismatch = planned.mismatch(step.args, step.kwargs)
    if mismatch is not None and mismatch.kind in FILLED_IN:
        yield OtherState("first calls: Python state is as it was when this was planned", contextlib.nullcontext())
    for text, numbers in _other_outcomes(step, others):
        yield OtherState(f"calls where {text}", _counted(step, planned, numbers))
    carried = _carried(step, planned)
    if carried:
        names = ", ".join(map(str, carried[:_MOST_NAMES])) + (" and others" if len(carried) > _MOST_NAMES else "")
        yield OtherState(f"calls that find {names} detached by the training loop", _detached(step, planned, carried))


def _other_outcomes(step: CapturedStep, others: Sequence[CheckpointedModule]) -> Iterator[tuple[str, list[Any]]]:
    """Numbers that calls will count to and that no plan is for: (the comparison that comes out otherwise, the numbers).

    The model is not run: what a call counts follows from what it finds, by the plan for it.

    Args:
        others: plans besides the step's own; one is added for numbers that were yielded, or no more are.
    """
    counts = step.joint.host.counts
    numbers, num_found = read_counts(counts, step.model), 0
    for _ in range(_MOST_COUNTED if counts.conditions else 0):
        try:
            of_call = _of_call(counts, others, numbers)
            if of_call is None and num_found < _MOST_OUTCOMES:
                num_found += 1
                where, now, _ = counts.difference(numbers) or ("", "", "")
                yield f"{where} is {now}", numbers
                of_call = _of_call(counts, others, numbers)
            following = None if of_call is None else [evaluated(expression, numbers) for expression in of_call.after]
        except ArithmeticError:  # which such a call raises, too
            return
        if following is None or following == numbers or max(map(abs, following)) > _LARGEST:
            return
        numbers = following


def _of_call(counts: Counts, others: Sequence[CheckpointedModule], numbers: list[Any]) -> Counts | None:
    """What a call that finds these numbers does, if a plan is for it."""
    known = [counts, *(other.step.joint.host.counts for other in others)]
    return next((each for each in known if each.places == counts.places and each.difference(numbers) is None), None)


@contextlib.contextmanager
def _counted(step: CapturedStep, planned: CheckpointedModule, numbers: list[Any]) -> Iterator[None]:
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
