"""Calls of other sizes (`dynamic=True`): a plan serves inputs up to the planned size; others get plans of their own.

A call of another size, or with another value that Python reads (is the mask full?), is captured when it first comes. Where it
has a planned graph, value by value, and none of its values is larger, that plan's schedule runs it within the planned peak: the
peak is a sum of values' bytes (`simulate`) and of kernels' workspace, which is assumed not to grow as inputs shrink. Otherwise
it is planned anew, for the same budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from planner.errors import CaptureError, PlannerError
from planner.graph.graph import Graph
from planner.graph.structure import first_difference, places, renamed, wiring
from planner.log import RUNTIME
from planner.report.progress import say, stage
from planner.results.plan import Plan
from planner.runtime.garbage import collected
from planner.runtime.guards.call_key import CallKey
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.step import RewrittenStep, make_step
from planner.tracer.faults import is_fault
from planner.tracer.host.fingerprint import describe_tensor, described, tensor_key
from planner.tracer.joint import Joint
from planner.tracer.lower import lower_like
from planner.tracer.real_layouts import capture
from planner.units import format_bytes

MOST_SIZES = 64
"""Maximum number of sizes that are remembered; then the one that did not come for longest is dropped."""
MOST_VARIANTS = 4
"""Maximum number of planned modules per size: a value that Python reads may be another one at every call."""


class PlannedModule(Protocol):
    """What is asked of a planned module."""

    plan: Plan
    alternatives: list[Any]

    @property
    def step(self) -> RewrittenStep:
        """The rewritten step."""

    @property
    def original(self) -> nn.Module:
        """The model."""


Planned = TypeVar("Planned", bound=PlannedModule)
Size = tuple[Any, ...]


class OtherSizes(Generic[Planned]):
    """Planned modules for calls of other sizes.

    Args:
        make: makes the planned module of a step and a plan.

    Attributes:
        known: the planned modules per size; one more for every combination of values that Python reads.
        refused: per size, why a call was not planned.
        planned_anew: those that have a schedule of their own.
        pauses: (what was captured or planned, seconds of wall clock), in order.
    """

    def __init__(self, make: Callable[[RewrittenStep, Plan], Planned]) -> None:
        self._make = make
        self.known: dict[Size, list[Planned]] = {}
        self.refused: dict[Size, Mismatch] = {}
        self.planned_anew: list[Planned] = []
        self.pauses: list[tuple[str, float]] = []

    def all(self) -> Iterator[Planned]:
        """Every planned module."""
        for modules in self.known.values():
            yield from modules

    def of_size(self, base: Planned, args: Any, kwargs: Any) -> list[Planned]:
        """The planned modules for calls of this size."""
        size = call_sizes(base.step, args, kwargs) if self.known else ()
        if size not in self.known:
            return []
        self.known[size] = modules = self.known.pop(size)  # the last to be dropped
        return modules

    def find(self, base: Planned, args: Any, kwargs: Mapping[str, Any]) -> Planned | Mismatch:
        """A planned module for this call, for which there is none yet; or why there can be none."""
        size = call_sizes(base.step, args, kwargs)
        if size in self.refused:
            return self.refused[size]
        modules = self.known.get(size, [])
        if len(modules) == MOST_VARIANTS:
            text = (
                f"a value that Python reads, or what requires grad, is another at every call; {MOST_VARIANTS} were planned for"
            )
            return Mismatch("value", "a value that Python reads", text=text)
        try:
            with collected():
                made = self._captured(base, args, kwargs)
        except PlannerError as error:
            if is_fault(error):
                raise
            RUNTIME.warning("inputs of another size, which run unplanned: %s", error)
            _make_room(self.refused)
            self.refused[size] = Mismatch("input", "the inputs' shape", text=str(error))
            return self.refused[size]
        if size not in self.known:
            dropped = _make_room(self.known) or []
            self.planned_anew = [module for module in self.planned_anew if not any(module is other for other in dropped)]
        self.known[size] = [*modules, made]
        return made

    def _captured(self, base: Planned, args: Any, kwargs: Mapping[str, Any]) -> Planned:
        recapture, model = base.step.recapture, base.original
        assert recapture is not None
        if recapture.plan is None:
            _check_covered(base.step, args, kwargs)
        size = call_sizes(base.step, args, kwargs)
        begun, shapes = time.monotonic(), shapes_text(size)
        if size == base.step.key.inputs or size in self.known:
            shapes = f"{shapes} with another value that Python reads"
        with stage(f"capturing {shapes}", recapture.progress):
            joint = capture(model, args, kwargs, loss=recapture.loss, opaque=recapture.opaque)
            made, what = self._planned(base, joint, args, kwargs)
        seconds = time.monotonic() - begun
        self.pauses.append((f"{what} {shapes}, the {_ordinal(len(self.pauses) + 2)} size", seconds))
        text = f"{type(model).__name__}: {self.pauses[-1][0]}, in {seconds:.1f} s"
        RUNTIME.info(text)
        say(f"planner: {text}", recapture.progress)
        return made

    def _planned(self, base: Planned, joint: Joint, args: Any, kwargs: Mapping[str, Any]) -> tuple[Planned, str]:
        """The planned module for a captured call, and what was done for it."""
        recapture, reasons = base.step.recapture, list[CaptureError]()
        for one in (base, *base.alternatives, *self.planned_anew):
            try:
                step, plan = step_of_other_size(one.step, one.plan, joint, base.original, args, kwargs)
                return self._make(step, plan), "captured"
            except CaptureError as error:
                reasons.append(error)
        if recapture is None or recapture.plan is None:
            raise reasons[0]
        RUNTIME.info("planned anew: %s", reasons[0])
        shapes = shapes_text(call_sizes(base.step, args, kwargs))
        say(f"planner: {type(base.original).__name__}: planning {shapes} while training waits", recapture.progress)
        made = recapture.plan(base.original, args, kwargs, joint, base.plan)
        self.planned_anew.append(made)
        return made, "planned"


def call_sizes(step: RewrittenStep, args: Any, kwargs: Any) -> Size:
    """Shape, strides, dtype, device and requires_grad of each tensor of the call."""
    return tuple(tensor_key(tensor) for tensor in step.joint.call.tensor_leaves(args, kwargs))


def shapes_text(size: Size) -> str:
    """The different shapes of a call's tensors: '(8, 50)'; those of scalars are left out beside others."""
    shapes = dict.fromkeys(tuple(shape) for shape, *_ in size)
    return ", ".join(str(shape) for shape in shapes if shape or len(shapes) == 1)


def sizes_texts(planned: Sequence[PlannedModule]) -> list[str]:
    """The shapes of each one's call; of calls with the same shapes, also the arguments that tell them apart."""
    keys = [one.step.key for one in planned]
    shapes = [shapes_text(key.inputs) for key in keys]
    arguments = [_arguments(key) for key in keys]
    found = []
    for text, own in zip(shapes, arguments, strict=True):
        alike = [other for other, its in zip(arguments, shapes, strict=True) if its == text]
        apart = [argument for argument in own if not all(argument in other for other in alike)]
        found.append(text + (": " if apart else "") + "; ".join(apart))
    return found


def _arguments(key: CallKey) -> list[str]:
    """What a call was planned for, an argument each: 'input 0 is float32[4, 8] ...', 'argument leaf 1 is True'."""
    tensors = [f"input {i} is {describe_tensor(one)}" for i, one in enumerate(key.inputs)]
    others = [f"argument leaf {i} is {described(one)}" for i, one in enumerate(key.arguments) if one is not None]
    return tensors + others


def larger_than_all(steps: Sequence[RewrittenStep], args: Any, kwargs: Any) -> str:
    """Which input is larger than every planned one, as a sentence's end; "" if none is, or the call has another structure."""
    try:
        texts = [_larger(step, args, kwargs) for step in steps]
    except IndexError:  # its mismatch says so
        return ""
    return texts[0] if all(texts) else ""


def _larger(step: RewrittenStep, args: Any, kwargs: Any) -> str:
    leaves = step.joint.call.tensor_leaves(args, kwargs)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return ""
    for i, (leaf, planned) in enumerate(zip(leaves, step.key.inputs, strict=False)):
        if _exceeds(leaf.shape, planned[0]):
            return f"input {i} is {list(leaf.shape)}, larger than the planned {list(planned[0])}"
    return ""


def _exceeds(shape: torch.Size, planned: torch.Size) -> bool:
    """Whether some dimension is larger; of shapes with other numbers of dimensions, whether there are more elements."""
    if len(shape) != len(planned):
        return shape.numel() > planned.numel()
    return any(n > m for n, m in zip(shape, planned, strict=True))


def step_of_other_size(
    step: RewrittenStep, plan: Plan, joint: Joint, model: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> tuple[RewrittenStep, Plan]:
    """The planned schedule for a call of smaller inputs, with the plan under the call's own names.

    Args:
        joint: the captured call.

    Raises:
        CaptureError: the call's graph is not the planned one, or has larger values.
    """
    graph = lower_like(joint, plan.graph)
    _check_smaller(plan.graph, graph)
    plan = replace(plan, graph=renamed(plan.graph, graph))
    return make_step(plan, joint, model, args, kwargs, step.num_stages, is_compiled=step.is_compiled), plan


def _check_covered(step: RewrittenStep, args: Any, kwargs: Any) -> None:
    """Raise CaptureError where an input is larger than planned, or of another kind."""
    for i, (now, planned) in enumerate(zip(call_sizes(step, args, kwargs), step.key.inputs, strict=True)):
        shape, _, *kind = now
        most, _, *expected = planned
        if kind != expected:
            raise CaptureError(f"input {i} is of another dtype, device or requires_grad")
        if len(shape) != len(most) or _exceeds(shape, most):
            raise CaptureError(f"input {i} is {list(shape)}; this dynamic plan covers up to {list(most)}")


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


def _make_room(sizes: dict[Size, Any]) -> Any:
    """Drop the first size, and return what was held for it, where there is no room for another; None where there is."""
    return sizes.pop(next(iter(sizes))) if len(sizes) >= MOST_SIZES else None


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def _ordinal(count: int) -> str:
    if count <= len(_ORDINALS):
        return _ORDINALS[count - 1]
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"
