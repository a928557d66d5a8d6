"""Planned small models, by a schedule or by a share of the plain peak."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

from planner import CheckpointedModule, plan
from planner.graph.schedule import Schedule
from planner.graph.solution import Solution
from planner.results.plan import Plan
from planner.rewriter.partition import partition
from planner.runtime.guards.call_key import call_key
from planner.runtime.step import RewrittenStep
from planner.tracer.capture import capture
from planner.tracer.lower import lower
from tests.support import models
from tests.support.training import trajectory


@functools.cache
def captured(name):
    """The model, its call, its joint graph, its Graph and what plain eager training gives."""
    model, args, kwargs = models.build(name)
    joint = capture(model, args, kwargs)
    return model, args, kwargs, joint, lower(joint), trajectory(copy.deepcopy(model), args, kwargs)


def rewritten(name: str, schedule: Schedule, num_stages: int = 4) -> CheckpointedModule:
    """A small model planned by a schedule."""
    model, args, kwargs, joint, graph, _ = captured(name)
    own = copy.deepcopy(model)
    key = call_key(joint.call.tensor_leaves(args, kwargs), joint)
    plan = Plan(graph, 2**40, 0, Solution("feasible", schedule, 0, 0.0, "test"))
    return CheckpointedModule(own, RewrittenStep(joint, partition(joint, graph, schedule), key, num_stages), plan)


def planned_attention(share=1.0, **options):
    """The small attention model, its planned module, and its call."""
    model, args, kwargs = models.build("attention")
    return model, plan(model, share, args, kwargs, costs="estimate", progress=False, **options), args, kwargs


def within_of(planned, asked):
    """Plans again as `plan` does, and notes the budgets it was asked for."""

    def within(aim_bytes):
        asked.append(aim_bytes)
        return planned if len(asked) == 1 else CheckpointedModule(planned.original, planned.step, replace(planned.plan), True)

    return within
