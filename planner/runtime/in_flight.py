"""Forwards that wait for their backwards: each holds what it saved, and a plan counts so many of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from torch import nn

from planner.errors import warn
from planner.results.plan import Plan
from planner.runtime.autograd import StepRun
from planner.units import format_bytes


class InFlight:
    """Says once that more forwards wait than a plan counts, where what they hold may exceed its budget."""

    def __init__(self, model: nn.Module, name: str = "") -> None:
        """`name`: what messages call the model; its class, if it has none."""
        self._name = name or type(model).__name__
        self._waiting: weakref.WeakKeyDictionary[StepRun, Plan] = weakref.WeakKeyDictionary()
        self._looks, self._lock = True, threading.Lock()

    def begun(self, run: StepRun, plan: Plan) -> StepRun:
        """A planned forward begins.

        Args:
            run: it waits until its backward has run, or its graph is gone.
            plan: that it runs by; those before it have plans of their own.
        """
        if self._looks:
            with self._lock:
                waiting = [other for one, other in self._waiting.items() if one.waits]
                self._waiting[run] = plan
            self._compare(plan, waiting)
        return run

    def _compare(self, plan: Plan, waiting: Sequence[Plan]) -> None:
        counted = plan.num_calls or plan.graph.in_flight
        if len(waiting) < counted:
            return
        uncounted_bytes = sum(sorted(other.saved_bytes for other in waiting)[counted - 1 :])
        missing_bytes = uncounted_bytes - plan.free_bytes
        if missing_bytes <= 0:
            return
        self._looks = False
        number = len(waiting) + 1
        cure, budget = "plan the units again, for a step that calls it as often as this one", "its budget"
        if not plan.num_calls:
            cure = f"run each backward before the next forward, or plan(..., in_flight={number})"
            budget = f"its budget of {format_bytes(plan.budget_bytes)}"
        warn(
            f"{self._name}: {cure}: {number} forwards wait for their backwards, and its plan counts {counted}. This step may "
            f"need {format_bytes(missing_bytes)} more than {budget}"
        )
