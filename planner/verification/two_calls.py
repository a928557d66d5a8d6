"""Two training steps of the model itself from the same state: do they give the same bits?"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import first_line
from planner.profiler.child import CAN_FORK, Child
from planner.profiler.timing import free_bytes
from planner.runtime.audit import difference
from planner.runtime.install import uninstall
from planner.runtime.planned_call import unplanned_forward
from planner.tracer.call import without_history
from planner.tracer.faults import is_fault, note
from planner.tracer.joint import Joint
from planner.units import format_bytes
from planner.verification.bits import step_digest
from planner.verification.check_step import detach_from_parent
from planner.verification.step_copy import CallArguments, copy_of

_TIMEOUT_S = 600.0
"""Wall seconds for two steps, after which nothing is known of them."""
_DOING = "running two steps of the model"


@dataclass(frozen=True, slots=True)
class TwoCalls:
    """What two steps from the same state did.

    Attributes:
        different: names of outputs, gradients, buffers, attributes and random states that differ.
        not_run: why no two steps were run; "" where they were.
    """

    different: tuple[str, ...] = ()
    not_run: str = ""


def two_calls(model: nn.Module, joint: Joint, call: CallArguments, needed_bytes: int) -> TwoCalls:
    """Run two steps of the model, forward and backward, and compare them bit by bit; the model stays as it is.

    On a CPU they run in a forked child process, elsewhere on a copy that shares the parameters' memory. Autocast is as it is
    here. Hooks of parameters do not run.

    Args:
        joint: the model's captured step.
        needed_bytes: what a plain step needs beside the model.

    Raises:
        Exception: a fault of the planner; of the child's a RuntimeError with its traceback. Lack of memory is a reason not to
            run them, and says nothing about the model.
    """
    if joint.absent_device:
        return TwoCalls(not_run="the device is not here")
    kind = joint.device.type
    cast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    if kind == "cpu":
        return _in_child(model, joint, call, cast, needed_bytes)
    try:
        with torch.random.fork_rng(devices=[joint.device]):
            return TwoCalls(_different(copy_of(model, sharing=True), joint, call, cast))
    except Exception as error:
        if is_fault(error):
            note(error, _DOING)
            raise
        return TwoCalls(not_run=first_line(error))


def _in_child(model: nn.Module, joint: Joint, call: CallArguments, cast: Any, needed_bytes: int) -> TwoCalls:
    free = free_bytes()
    if not CAN_FORK:
        return TwoCalls(not_run="this system cannot fork a process")
    if free is not None and needed_bytes > free:
        return TwoCalls(not_run=f"a step needs {format_bytes(needed_bytes)} beside the model, {format_bytes(free)} are free")

    def answers() -> Iterator[dict[str, Any]]:
        try:
            detach_from_parent(model, joint)
            yield {"different": _different(model, joint, call, cast)}
        except Exception as error:
            if is_fault(error):
                yield {"fault": "".join(traceback.format_exception(error))}
            else:
                yield {"not_run": first_line(error)}

    try:
        child = Child(answers)
    except OSError as error:  # no memory, or no process left
        return TwoCalls(not_run=first_line(error))
    try:
        line = child.read(_TIMEOUT_S)
    finally:
        child.end()
    if line is None:
        return TwoCalls(not_run=f"its process {child.fate}")
    answer = json.loads(line)
    if "fault" in answer:
        raise RuntimeError(f"The planner failed while it was {_DOING}: please report this traceback\n{answer['fault']}")
    return TwoCalls(tuple(answer.get("different", ())), answer.get("not_run", ""))


def _different(model: nn.Module, joint: Joint, call: CallArguments, cast: Any) -> tuple[str, ...]:
    """Names of what two steps leave different; runs them on the model, and on tensors of its own in the call's memory."""
    uninstall(model)
    own: dict[int, torch.Tensor] = {}
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, torch.Tensor) and id(leaf) not in own:
            own[id(leaf)] = without_history(leaf)
    args, kwargs = pytree.tree_map(lambda leaf: own.get(id(leaf), leaf), call)
    run = partial(step_digest, model, joint, (args, kwargs), lambda: unplanned_forward(model)(*args, **kwargs), autocast=cast)
    return difference(run(), run())
