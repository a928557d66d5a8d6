"""Warnings and errors for calls that do not run planned."""

from __future__ import annotations

import torch
from torch import nn

from planner.errors import PlanAuditError, PlanMissError, warn
from planner.runtime.guards.mismatch import Mismatch


class PlanMissWarning(UserWarning):
    """A call was not the one planned for; the original forward ran instead."""


def report_mismatch(model: nn.Module, mismatch: Mismatch, warned: set[str], strict: bool, num_plans: int = 1) -> None:
    """Warn that a training call runs unplanned, once per reason and input size; evaluation (eval, no_grad) is not warned about.

    Args:
        warned: what was warned about before; extended here.
        num_plans: number of plans that the call was compared with.

    Raises:
        PlanMissError, PlanAuditError: `strict`, and the call trains.
    """
    if not (model.training and torch.is_grad_enabled()):
        return
    which = "the planned step" if num_plans == 1 else f"one of the {num_plans} planned steps"
    if strict:
        if mismatch.kind == "audit":
            raise PlanAuditError(f"{type(model).__name__}: {mismatch}. Train unplanned")
        raise PlanMissError(
            f"{type(model).__name__}: not {which}, {mismatch} differs. Plan for this call too, or let it run unplanned"
        )
    reason = str(mismatch) if mismatch.kind == "input" else mismatch.where
    if reason not in warned:
        warned.add(reason)
        differs = str(mismatch) if mismatch.kind == "audit" else f"not {which}, {mismatch} differs{_cure(mismatch)}"
        warn(f"{type(model).__name__}: {differs}; the original forward runs, unplanned", PlanMissWarning)


def _cure(mismatch: Mismatch) -> str:
    """How to have both calls planned; "" where it depends."""
    if mismatch.kind in ("input", "argument"):
        return " (plan both: plan(..., also=[(args, kwargs)]))"
    if mismatch.kind == "host" and mismatch.is_absent:
        return " (the first call fills it; run the model once before planning to plan that call, too)"
    return ""
