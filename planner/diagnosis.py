"""doctor: how a model's training step is captured, and what stands in the way of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Unpack

import torch
from torch import nn

from planner import arguments
from planner.captured import CapturedStep, captured
from planner.errors import PlannerError
from planner.graph.graph import Graph, Kind
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.graph.structure import fingerprint, first_difference
from planner.options import DoctorKeywords, PlanOptions, read_options, with_options
from planner.profiler.devices import find_device
from planner.report.progress import stage
from planner.results.diagnosis import Diagnosis, Once, Opaque, Read
from planner.runtime.criterion import planned_model
from planner.tracer.capture import one_at_a_time
from planner.tracer.faults import is_fault
from planner.tracer.host.values import ABSENT
from planner.tracer.joint import Joint
from planner.tracer.lower import lower, never_recomputed
from planner.tracer.opaque.choose import why_opaque
from planner.tracer.target_device import TargetDevice
from planner.units import shown
from planner.verification.two_calls import TwoCalls, two_calls


@with_options(DoctorKeywords)
def doctor(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Unpack[DoctorKeywords]
) -> Diagnosis:
    """How a model's training step is captured, and what stands in the way of a plan.

    The step is captured twice, and the captures are compared. Two steps of the model itself are run from the same state and
    compared bit by bit: on a CPU in a forked child process, elsewhere on a copy. The model is left as it is.

    Args:
        model, args, kwargs: as for `planner.plan`.
        options: see below.

    Returns:
        the Diagnosis, plain data; `problems` says what prevents planning.

    Raises:
        InputError: model, args, kwargs or options are of a wrong type.
        Exception: a fault of the planner, or lack of memory for the capture; see `planner.tracer.faults`.
    """
    checked = read_options(options, DoctorKeywords, "doctor")
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    target = None if checked.device is None else find_device(checked.device)
    there = None if target is None else TargetDevice(target.name, target.capability)
    try:
        step = captured(model, args, kwargs, checked, there)
    except PlannerError as error:
        if is_fault(error):
            raise
        return Diagnosis(type(model).__name__, problems=(f"{type(error).__name__}: {error}",))
    graph = lower(step.joint)
    again = _captured_again(model, args, kwargs, checked, there, graph)
    peak_bytes = simulate(graph, keep_all(graph)).peak_bytes
    with one_at_a_time(), stage("run two steps", checked.progress):
        twice = two_calls(step.model, step.joint, (step.args, step.kwargs), peak_bytes - graph.resident_bytes)
    return _diagnosis(type(model).__name__, step, graph, checked, peak_bytes, again, twice)


@dataclass(frozen=True, slots=True)
class _Again:
    """What a second capture came to.

    Attributes:
        difference: the first one from the first capture; "" where they agree.
        problem: what this means for planning; "" likewise.
    """

    difference: str = ""
    problem: str = ""


def _captured_again(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: PlanOptions,
    target: TargetDevice | None,
    first: Graph,
) -> _Again:
    """Capture the step a second time, and compare."""
    try:
        second = lower(captured(model, args, kwargs, options, target).joint)
    except PlannerError as error:
        if is_fault(error):
            raise
        return _Again(str(error), f"a second capture fails, {type(error).__name__}: {error}")
    if fingerprint(first) == fingerprint(second):
        return _Again()
    difference = first_difference(first, second)
    return _Again(difference, f"two captures of the same call differ, and a plan is of one of them: {difference}")


def _diagnosis(
    model: str, step: CapturedStep, graph: Graph, options: PlanOptions, peak_bytes: int, again: _Again, twice: TwoCalls
) -> Diagnosis:
    joint = step.joint
    written = [f"{given.kind} {given.key}" for given in joint.inputs if given.mutated]
    opaque = _opaque(planned_model(step.model), joint, options)
    reads = tuple(Read(str(read.source), shown(read.value)) for read in joint.host_reads)
    return Diagnosis(
        model,
        problems=tuple(filter(None, (again.problem,))),
        warnings=_warnings(twice, reads, opaque),
        device=joint.absent_device or str(joint.device),
        num_ops=len(graph.ops),
        num_forward_ops=graph.num_forward_ops,
        peak_bytes=peak_bytes,
        starts=tuple(out.name or "the output" for out in (*joint.outputs, *joint.left) if out.differentiated),
        opaque=opaque,
        refused=joint.refused,
        carried=(*map(str, joint.host.state), *map(str, joint.host.counts.places), *written),
        left=tuple(str(effect.path) for effect in joint.host.effects),
        guarded=_guarded(joint),
        settings=tuple(dict.fromkeys(str(path) for path, _ in joint.host.key.expected if _is_setting(path.get(step.model)))),
        reads=reads,
        repeats=tuple((kind, tuple(names)) for kind, names in joint.repeats.items()),
        once=_once(joint, graph),
        captures_differ=again.difference,
        calls_differ=twice.different,
        calls_not_run=twice.not_run,
    )


def _is_setting(value: Any) -> bool:
    """Data, and no code, submodule or weight, which are compared as well but are nothing that a user sets."""
    return (
        value is not ABSENT and not callable(value) and not isinstance(value, (nn.Module, ModuleType, property, torch.Tensor))
    )


def _opaque(model: nn.Module, joint: Joint, options: PlanOptions) -> tuple[Opaque, ...]:
    calls = defaultdict(list)
    for call in joint.opaque_calls.values():
        calls[call.module].append(call)
    modules = dict(model.named_modules())
    found = []
    for name, made in calls.items():
        module = modules.get(name)
        known = "" if module is None else why_opaque(module)
        why = "opaque= names it" if name in options.opaque else known or f"it could not be captured: {joint.refused}"
        kind = "" if module is None else type(module).__name__
        found.append(Opaque(name, kind, why, all(c.repeatable for c in made), any(any(c.draws) for c in made)))
    return tuple(found)


def _guarded(joint: Joint) -> tuple[str, ...]:
    hooked = sum(bool(module.hooks) for module in joint.modules)
    tensors = sum(given.kind is Kind.INPUT for given in joint.inputs)
    found = [
        f"{tensors} input tensor{_s(tensors)} (shape, strides, dtype, device, requires_grad)",
        f"{len(joint.weights)} parameters and buffers (shape, dtype, requires_grad)",
        f"{len(joint.modules)} module{_s(len(joint.modules))} (class, hooks, tied tensors)"
        f"{f', {hooked} with hooks' if hooked else ''}",
        "autocast and torch's other switches",
    ]
    if joint.host.key.environment:
        found.append("environment " + ", ".join(name for name, _ in joint.host.key.environment))
    return tuple(found)


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def _once(joint: Joint, graph: Graph) -> tuple[Once, ...]:
    ops = {op.name: op for op in graph.ops[: graph.num_forward_ops]}
    grouped = defaultdict(list)
    for name, why in never_recomputed(joint).items():
        if name in ops:
            grouped[why].append(ops[name])
    return tuple(
        Once(why, len(group), sum(graph.value[name].nbytes for op in group for name in op.writes), group[0].text)
        for why, group in grouped.items()
    )


def _warnings(twice: TwoCalls, reads: Sequence[Read], opaque: Sequence[Opaque]) -> tuple[str, ...]:
    warnings = []
    if twice.different:
        warnings.append(
            "two steps of the model itself differ, so a planned step cannot be compared with it bit by bit: "
            f"{', '.join(twice.different[:3])}"
        )
    if reads:
        warnings.append("Python reads tensor values: a call in which one of them is another runs unplanned")
    if opaque:
        number = f"{len(opaque)} submodule{_s(len(opaque))}"
        warnings.append(f"{number} not captured: what they keep for the backward cannot be freed")
    return tuple(warnings)
