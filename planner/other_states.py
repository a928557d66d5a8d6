"""Python state that calls may find beside the one that was captured: of a first call, and what the training loop has detached.

A step is captured as later calls run: each finds what the one before left. A plan for the other calls is made as theirs, with
the model brought into their state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from planner.captured import CapturedStep
from planner.graph.graph import Kind
from planner.runtime.audit import rewound, run_original
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.host.state import Path


@dataclass(frozen=True, slots=True)
class OtherState:
    """Python state that some calls find.

    Attributes:
        calls: which calls do.
        entered: a context in which the model is in that state.
    """

    calls: str
    entered: AbstractContextManager[None]


def other_states(step: CapturedStep, planned: CheckpointedModule) -> Iterator[OtherState]:
    """The states that calls of a captured step may find, and that its planned module is not for."""
    if planned.mismatch(step.args, step.kwargs) is not None:
        yield OtherState("the first call, which finds what the model was built with", contextlib.nullcontext())
    carried = _carried(step)
    if carried:
        names = ", ".join(map(str, carried[:_MOST_NAMES])) + (" and others" if len(carried) > _MOST_NAMES else "")
        yield OtherState(f"calls that find {names} detached by the training loop", _detached(step, carried))


_MOST_NAMES = 4


def _carried(step: CapturedStep) -> list[Path]:
    """Places of tensors that one call leaves with their autograd graph and the next one reads."""
    joint, first = step.joint, len(step.joint.call.tensors)
    differentiated = [int(given.key) for given, _ in joint.gradients if given.kind is Kind.INPUT]
    places = [joint.host.state[i - first] for i in differentiated if i >= first]
    if not places:
        return []
    with _after_a_call(step):
        return [path for path in places if not _tensor_at(path, step.model).is_leaf]


@contextlib.contextmanager
def _detached(step: CapturedStep, places: list[Path]) -> Iterator[None]:
    """While entered, the model is as after a call, with the tensors at these places detached."""
    with _after_a_call(step):
        for path in places:
            path.set(step.model, _tensor_at(path, step.model).detach())
        yield


@contextlib.contextmanager
def _after_a_call(step: CapturedStep) -> Iterator[None]:
    """While entered, Python state is as the model's forward leaves it."""
    model, joint = step.model, step.joint
    given = joint.call.tensor_leaves(step.args, step.kwargs)
    written = [tensor for tensor in (*model.buffers(), *given) if not tensor.requires_grad]
    with rewound(model, joint.host.key, written, joint.device):
        run_original(unplanned_forward(model), step.args, step.kwargs)
        yield


def _tensor_at(path: Path, model: nn.Module) -> torch.Tensor:
    found = path.get(model)
    assert isinstance(found, torch.Tensor), path
    return found
