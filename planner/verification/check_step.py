"""One planned step at the end of `plan`: it has to run, return what was captured, on a CPU bit for bit, and keep its budget.

On a CPU it runs in a forked child process on the model itself, which leaves the parent's model as it is; on an accelerator, and
where inductor compiles the step, on a copy of the model that shares its parameters' memory.
"""

from __future__ import annotations

import json
import linecache
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from planner._compat import pytree
from planner.errors import InputError, PlanCheckError, PlannerError, first_line
from planner.graph.accumulation import num_stages
from planner.graph.source import NOWHERE, Source, source_from_json, source_to_json
from planner.log import VERIFICATION
from planner.profiler.child import CAN_FORK, Child
from planner.profiler.memory import logical_peak
from planner.profiler.timing import free_bytes
from planner.rewriter.partition import ORIGIN
from planner.runtime.install import uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import unplanned_forward
from planner.runtime.step import RewrittenStep
from planner.tracer.faults import is_out_of_memory
from planner.tracer.host.arguments import bound_and_restored
from planner.tracer.joint import Joint
from planner.units import format_bytes
from planner.verification.bits import different_results
from planner.verification.state import strides_that_matter
from planner.verification.step_copy import (
    CallArguments,
    StepCopy,
    aligned,
    autocast_of,
    backward_of_ones,
    copy_of,
    cut_history,
    own_call,
    resident_bytes,
    run_first_calls,
    state_found,
)

_TIMEOUT_S, _TIMEOUT_STEPS = 60.0, 50.0
"""Time limit of a child process: seconds, plus a multiple of the predicted step."""


class NotRunError(InputError):
    """No step could be run, for a reason that says nothing about the plan.

    Attributes:
        expected: models or devices of this kind are known not to run here, so there is nothing to warn about.
    """

    def __init__(self, message: str, *, expected: bool = False) -> None:
        super().__init__(message)
        self.expected = expected


def run_step(planned: CheckpointedModule, call: CallArguments) -> int:
    """Run and check one planned step; its measured peak in bytes, resident bytes included.

    Model, gradients, inputs and generators stay as they are. Hooks of the model and of its parameters do not run.

    Raises:
        NotRunError: it could not be run, for a reason that says nothing about the plan.
        CopyError: likewise, because the model cannot be copied.
        PlanCheckError: it fails, returns tensors whose shape, dtype, strides or requires_grad are not as captured, or
            other bits than the model's own step.
    """
    if planned.device.type == "cpu" and not planned.step.is_compiled:
        return _in_child(planned, call)
    return _in_process(planned, call)


def _in_process(planned: CheckpointedModule, call: CallArguments) -> int:
    cuda = planned.device.type == "cuda"
    try:
        step_copy = StepCopy(copy_of(planned, sharing=True), planned, call)
    except torch.OutOfMemoryError as error:
        raise _no_memory(planned) from error
    with torch.random.fork_rng(devices=[planned.device] if cuda else []):
        try:
            step_copy.prepare()
            run_first_calls(step_copy.module, step_copy.call)  # type: ignore[arg-type]
            wrong = _check(step_copy.module, step_copy.call)
            if not wrong:
                return step_copy.peak()
        except PlannerError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise _fault(planned, *_error_and_source(error, planned.step)) from error
            raise _no_memory(planned) from error
    raise _fault(planned, wrong, NOWHERE)


def _no_memory(planned: CheckpointedModule) -> NotRunError:
    cuda = planned.device.type == "cuda"
    free = f", {format_bytes(torch.cuda.mem_get_info(planned.device)[0])} are free" if cuda else ""
    return NotRunError(f"the device has too little memory for the step's {format_bytes(planned.plan.peak_bytes)}{free}")


def _in_child(planned: CheckpointedModule, call: CallArguments) -> int:
    if not CAN_FORK:
        raise NotRunError("this system cannot fork a process", expected=True)
    reason = _communicates(planned.step.joint)
    if reason:
        raise NotRunError(reason, expected=True)
    timeline = planned.plan.timeline
    needed, free = timeline.peak_bytes - resident_bytes(planned), free_bytes()
    if free is not None and needed > free:
        raise NotRunError(f"the step needs {format_bytes(needed)} beside the model, {format_bytes(free)} are free")
    timeout_s = _TIMEOUT_S + _TIMEOUT_STEPS * timeline.time_ns / 1e9
    try:
        child = Child(lambda: _answers(planned, call))
    except OSError as error:
        raise NotRunError(f"no process can be forked: {error}") from error
    try:
        answer: dict[str, Any] = {}
        while not answer.get("last"):
            line = child.read(timeout_s)
            if line is None and answer:
                break  # the child ended after a first answer: nothing is known about the model's own step
            if line is None:
                raise NotRunError(f"its process {child.fate}")
            answer |= json.loads(line)
    finally:
        child.end()
    if "not run" in answer:
        raise NotRunError(answer["not run"])
    if "not compared" in answer:
        VERIFICATION.info("the planned step's bits were not compared with the model's own: %s", answer["not compared"])
    if "wrong" in answer:
        raise _fault(planned, answer["wrong"], source_from_json(answer["where"], "where the step failed"))
    return int(answer["peak_bytes"])


def _communicates(joint: Joint) -> str:
    """Why the step must not run in one process alone; "" if it may."""
    names = {getattr(node.target, "namespace", "") for node in joint.graph.nodes}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if any("c10d" in name for name in names):
        return "it communicates with other processes"
    if joint.opaque_calls and distributed:
        return "submodules run as they are, and may communicate with other processes"
    return ""


def _answers(planned: CheckpointedModule, call: CallArguments) -> Iterator[dict[str, Any]]:
    """Run in the child: what it finds; each answer adds to the one before."""
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        yield {"not run": "torch's autograd does not run in a forked process here", "last": True}
        return
    detach_from_parent(planned.original, planned.step.joint)
    own = own_call(planned, call)
    planned.__dict__["audits"] = False  # an audit would count as part of the step
    found = state_found(planned.step.joint, planned.original)
    wrong: list[str] = []

    def check() -> None:
        found.restore()
        wrong.append(_check(planned, own))

    try:
        run_first_calls(planned, own)
        if num_stages(planned.plan.graph):  # what is measured finds the gradients of this one
            check()
        above = logical_peak(check, planned.device)
        if not wrong[0] and resident_bytes(planned) + above > planned.plan.budget_bytes:
            if not num_stages(planned.plan.graph):
                _clear(planned, own)
            # what a first call allocates for good is not part of a step
            above = logical_peak(check, planned.device)
        if any(wrong):
            yield {"wrong": next(filter(None, wrong)), "where": [], "last": True}
        else:
            found.restore()
            yield {"peak_bytes": resident_bytes(planned) + above}
            yield {"last": True, "where": []} | _bits_differ(planned, own)
        return
    except NotRunError as error:
        yield {"not run": str(error), "last": True}
        return
    except Exception as error:
        if is_out_of_memory(error):
            yield {"not run": "the machine has too little memory for it", "last": True}
            return
        text, where = _error_and_source(error, planned.step)
        yield {"wrong": text, "where": source_to_json(where)}
    yield {"last": True} | _plain_fails(planned, own)


def _bits_differ(planned: CheckpointedModule, call: CallArguments) -> dict[str, str]:
    """{"wrong": ...} where the planned step's results differ from the model's in any bit, {} where they agree.

    {"not compared": ...} where the model's own step cannot run.
    """
    free = free_bytes()
    if free is None:  # a plain step may need many times the budget
        return {"not compared": "this system does not say how much memory is free"}
    if planned.plan.plain.peak_bytes - resident_bytes(planned) > free:
        return {"not compared": "the machine has too little memory for a plain step"}
    try:
        different = different_results(planned, call)
    except Exception as error:  # the planned step has run: it is the model's own that does not run in a forked process
        return {"not compared": first_line(error)}
    if not different:
        return {}
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return {"wrong": f"the planned step's results differ from the model's in: {', '.join(different[:5])}{more}"}


def _plain_fails(planned: CheckpointedModule, call: CallArguments) -> dict[str, str]:
    """{"not run": ...} where the model's own step fails in a forked process, too; else {}."""
    _clear(planned, call)
    cut_history(planned.step.joint, planned.original)
    try:
        uninstall(planned.original)
        with bound_and_restored(*call):
            with autocast_of(planned):
                out = unplanned_forward(planned.original)(*call[0], **call[1])
            leaves = aligned(planned.step.joint, pytree.tree_leaves(out))
            backward_of_ones(planned.starts(leaves), planned.device)
    except Exception as error:
        if not is_out_of_memory(error):
            return {"not run": f"the model's own step fails in a forked process: {first_line(error)}"}
    return {}


def detach_from_parent(model: nn.Module, joint: Joint) -> None:
    """In a forked child: give the model new parameters without hooks and gradients, and buffers that are not shared."""
    own: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in own:
                    fresh = nn.Parameter(parameter.detach(), parameter.requires_grad)
                    fresh.__dict__.update(parameter.__dict__)
                    own[id(parameter)] = (parameter, fresh)
                module._parameters[name] = own[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_shared():
                own.setdefault(id(buffer), (buffer, buffer.detach().clone()))
                module._buffers[name] = own[id(buffer)][1]
    for path, _ in joint.host.aliases:  # where Python state holds them, too (a dictionary of the parameters)
        if id(held := path.get(model)) in own:
            path.replace(model, own[id(held)][1])


def _clear(planned: CheckpointedModule, call: CallArguments) -> None:
    planned.zero_grad(set_to_none=True)
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, torch.Tensor):
            leaf.grad = None


def _check(planned: Any, call: CallArguments) -> str:
    """Run a step; the first output or gradient that is not as captured, or "".

    Raises:
        NotRunError: the call is not the planned one.
    """
    cut_history(planned.step.joint, planned.original)
    with torch.enable_grad(), bound_and_restored(*call):
        with autocast_of(planned):
            out, mismatch = planned.attempt(*call)
        if mismatch:
            raise NotRunError(f"the planned module does not recognize its own example call: {mismatch}")
        leaves = aligned(planned.step.joint, pytree.tree_leaves(out))
        wrong = _outputs_differ(planned.step.joint, leaves)
        if not wrong:
            backward_of_ones(planned.starts(leaves), planned.device)
    return wrong or _gradients_missing(planned, call)


def _outputs_differ(joint: Joint, leaves: list[Any]) -> str:
    captured = {node.name: node.meta.get("val") for node in joint.graph.nodes}
    for output, leaf in zip(joint.outputs, leaves, strict=True):
        fake = None if output.result is None else captured.get(joint.results[output.result])
        if not isinstance(fake, torch.Tensor):
            continue
        if not isinstance(leaf, torch.Tensor):
            return f"output {output.name} is a {type(leaf).__name__}, captured as a tensor"
        found, expected = _metadata(leaf, leaf.requires_grad), _metadata(fake, output.requires_grad)
        for what, now, then in zip(("shape", "dtype", "device", "strides", "requires_grad"), found, expected, strict=True):
            if now != then:
                return f"output {output.name} has {what} {now}, captured with {then}"
    return ""


def _metadata(tensor: torch.Tensor, requires_grad: bool) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device.type, strides_that_matter(tensor), requires_grad


def _gradients_missing(planned: CheckpointedModule, call: CallArguments) -> str:
    if planned.step.joint.opaque_calls:  # an opaque module may leave a parameter without one: an expert that received no row
        return ""
    owners: dict[Any, Any] = {**dict(planned.original.named_parameters()), **dict(planned.original.named_buffers())}
    owners |= dict(enumerate(planned.step.joint.call.tensor_leaves(*call)))
    for given, _ in planned.step.joint.gradients:
        owner = owners.get(given.key)
        if owner is not None and owner.is_leaf and owner.grad is None:
            return f"{'input ' if isinstance(given.key, int) else ''}{given.key} gets no gradient, captured with one"
    return ""


def _error_and_source(error: BaseException, step: RewrittenStep) -> tuple[str, Source]:
    """The error's first line, and the user's line that the failing kernel comes from."""
    graphs = (step.partitioned.backward, step.partitioned.forward)
    origins = {node.name: node.meta.get(ORIGIN, node.name) for graph in graphs for node in graph.nodes}
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            line = linecache.getline(frame.f_code.co_filename, number, frame.f_globals)
            node = line.partition(" = ")[0].strip()
            return first_line(error), step.joint.sources.get(origins.get(node, node), NOWHERE)
    return first_line(error), NOWHERE


def _fault(planned: CheckpointedModule, what: str, where: Source) -> PlanCheckError:
    name, line = type(planned.original).__name__, where.place.strip("()")
    at = f" in {where.module}{f' ({line})' if line else ''}" if where.module else f" at {line}" if line else ""
    around = f"opaque=[{where.module!r}]" if where.module else "opaque=[...] naming the submodule it comes from"
    return PlanCheckError(
        f"{name}: the planned step fails{at}: {what}. This is a fault of the planner, not of the model, which is as it was: "
        f"please report it. Until it is fixed, plan with {around}, or train unplanned"
    )
