"""A captured training step: a model, an example call and their joint graph. A plan of that graph is applied to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from planner import arguments
from planner.errors import PlanFileError
from planner.graph.graph import Graph
from planner.graph.planned import NOT_RUN
from planner.graph.structure import fingerprint, first_difference, has_kernels, renamed
from planner.options import PlanOptions
from planner.report.progress import stage
from planner.results.plan import Plan, as_plan
from planner.runtime.criterion import with_criterion
from planner.runtime.module import CheckpointedModule
from planner.runtime.ranks import communicates
from planner.runtime.step import Recapture, make_step
from planner.tracer.capture import collections_paused, one_at_a_time
from planner.tracer.joint import Joint
from planner.tracer.lower import lower_like
from planner.tracer.real_layouts import capture
from planner.tracer.target_device import TargetDevice
from planner.verification.measured import measured_within, noted

SWITCHED_OFF = "switched off by check=False"
COMMUNICATES = "it communicates: a rank that plans alone would wait for the others for ever"
ABSENT = "the device is not here"


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A training step as it was captured, with the model and the example call, which it keeps alive.

    Attributes:
        model: what is planned: the user's model, or that with its criterion.
        args, kwargs: the example call.
        options: how it was captured, and is planned and run.
        joint: forward and backward as one graph.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: PlanOptions
    joint: Joint

    def apply(self, plan: Plan | str | os.PathLike[str]) -> CheckpointedModule:
        """The model, rewritten by a plan of this step: a point of a sweep, or a plan from a file. Captures nothing again.

        Raises:
            InputError: `plan` is neither a Plan nor the name of a plan's file.
            PlanFileError: the file cannot be read, or the plan was made for another graph; names the first difference.
            CompileError: inductor cannot compile it, or makes of it what needs more than the plan's budget.
            MeasuredPeakError: the step needs more than the plan's budget here.
            PlanCheckError: the planned step fails. This is a fault of the planner.
        """
        plan = as_plan(plan)
        with one_at_a_time():
            plan = self.recognized(plan)
            planned = self.rewritten(plan)
            for args, kwargs in self.options.sizes:
                planned.prepare(args, kwargs)
            if self.why_not_run:
                return noted(planned, f"{NOT_RUN}: {self.why_not_run}")
            limit = max(plan.budget_bytes, plan.measured_bytes or 0)  # it may be known to need more than its budget
            return measured_within(limit, lambda _: planned, self.args, self.kwargs, tries=1, progress=self.options.progress)

    def recognized(self, plan: Plan) -> Plan:
        """The plan under the names of this step's graph.

        Where the step communicates, the plan may be another rank's: kernels' arguments may then differ.

        Raises:
            PlanFileError: it was made for another graph; names the first difference.
        """
        graph = lower_like(self.joint, plan.graph)
        _check_same(plan, graph, arguments=not communicates(self.joint))
        return replace(plan, graph=renamed(plan.graph, graph))

    def rewritten(self, plan: Plan, fraction: float | None = None) -> CheckpointedModule:
        """The model, rewritten by a plan under the names of this step's graph; no step is run.

        Args:
            plan: see `recognized`.
            fraction: the budget, where it was given as a fraction of the plain step's peak.
        """
        options = self.options
        recapture = None
        if options.dynamic:
            recapture = Recapture(options.loss, tuple(options.opaque), self.plan_anew, options.progress)
        with collections_paused():
            step = make_step(
                plan, self.joint, self.model, self.args, self.kwargs, options.num_stages, recapture, options.compile, fraction
            )
            return CheckpointedModule(self.model, step, plan, options.strict, audits=options.audit)

    @property
    def plan_anew(self) -> Callable[..., CheckpointedModule] | None:
        """What plans other calls of the model; None: nothing does."""
        return None

    @property
    def why_not_run(self) -> str:
        """Why no planned step is to be run as a check; "" where one is."""
        if self.joint.absent_device:
            return ABSENT
        if not self.options.check:
            return SWITCHED_OFF
        return COMMUNICATES if communicates(self.joint) else ""


def captured(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    options: PlanOptions,
    absent: TargetDevice | None = None,
) -> CapturedStep:
    """Capture a training step of a model.

    Args:
        absent: the device to capture for, where it is not here.

    Raises:
        InputError, CaptureError: what was given cannot be planned; says why.
    """
    arguments.check_model(model)
    args, kwargs = arguments.check_call(args, kwargs)
    model, named, options = criterion_inside(model, kwargs, options)
    with one_at_a_time(), stage("capture", options.progress):
        joint = capture(model, args, named, loss=options.loss, opaque=options.opaque, target=absent)
    return CapturedStep(model, args, named, options, joint)


def criterion_inside(
    model: nn.Module, kwargs: Mapping[str, Any] | None, options: PlanOptions
) -> tuple[nn.Module, dict[str, Any], PlanOptions]:
    """What is planned where a criterion is given: model and criterion as one module. Without one, what was given.

    Raises:
        InputError: criterion and criterion_args do not go together, or with the model.
    """
    inside = with_criterion(model, kwargs, options.loss, tuple(options.opaque), options.criterion, options.criterion_args)
    model, named, loss, opaque = inside
    return model, named, replace(options, loss=loss, opaque=opaque, criterion=None, criterion_args=None)


def _check_same(plan: Plan, graph: Graph, *, arguments: bool) -> None:
    """Raise PlanFileError unless the plan is of the captured graph; `arguments`: kernels' arguments are compared, too."""
    if not has_kernels(plan.graph):
        raise PlanFileError(
            "the plan does not say which kernels it was made for (a file of an earlier release, schema 1): it can be shown, "
            "explained and solved again, not applied. Make it again with planner.plan."
        )
    if fingerprint(plan.graph, arguments=arguments) == fingerprint(graph, arguments=arguments):
        return
    made = plan.provenance.torch if plan.provenance is not None else "unknown"
    versions = "" if made == torch.__version__ else f" The plan was made with torch {made}, this is {torch.__version__}."
    raise PlanFileError(
        f"the plan was made for another model or call: {first_difference(plan.graph, graph)}.{versions} Make it again."
    )
