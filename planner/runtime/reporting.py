"""What planned modules say: warnings and errors for calls that do not run planned, failed audits, a summary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from planner.errors import MismatchError, PlanAuditError, warn
from planner.results.plan import Plan
from planner.runtime.guards.mismatch import Mismatch
from planner.units import format_bytes


class MismatchWarning(UserWarning):
    """A call was not the one planned for; the original forward ran instead."""


EVALUATION = ("evaluation", "")
"""The reason of calls that do not train."""


def trains(model: nn.Module) -> bool:
    """Whether a call of the model now is one of training: neither in eval mode nor under no_grad."""
    return model.training and torch.is_grad_enabled()


def report_mismatch(
    model: nn.Module,
    mismatch: Mismatch,
    warned: set[str],
    strict: bool,
    *,
    num_plans: int = 1,
    larger: str = "",
    is_unit: bool = False,
) -> None:
    """Warn that a training call runs unplanned, once per reason and input size; evaluation (eval, no_grad) is not warned about.

    A call that is larger than the planned one is warned about whatever was said before: it may run out of memory.

    Args:
        warned: what was warned about before; extended here.
        num_plans: number of plans that the call was compared with.
        larger: which input is larger than planned, "" if none is.
        is_unit: the model is a unit of a larger one, planned by `plan_units`.

    Raises:
        MismatchError, PlanAuditError: `strict`, and the call trains.
    """
    if not trains(model):
        return
    name, text = type(model).__name__, f"{mismatch.explained}{_cure(mismatch, is_unit)}"
    if num_plans > 1:
        text = f"none of its {num_plans} plans is for this call: {text}"
    if strict:
        if mismatch.kind == "audit":
            raise PlanAuditError(f"{name}: {mismatch}. Train unplanned")
        raise MismatchError(f"{name} would run unplanned, and strict=True: {text}")
    if larger:
        text = f"{text.rstrip('.')}. It may need more than the budget: {larger}"
    reasons = {str(mismatch) if mismatch.kind == "input" else mismatch.where, larger} - {""}
    if not reasons <= warned:
        warned |= reasons
        warn(f"{name} runs unplanned: {text}", MismatchWarning)


def _cure(mismatch: Mismatch, is_unit: bool) -> str:
    """What to do about a mismatch of this kind, as a further sentence; "" where it depends."""
    if mismatch.cure:
        return ""
    if mismatch.kind in ("input", "argument") and not mismatch.text:
        if is_unit:
            return ". A unit runs planned for the calls of the step that plan_units was given: give it the usual one"
        sizes = ", or for sizes as they come dynamic=True" if mismatch.kind == "input" else ""
        return f". To plan both: plan(..., also=[(args, kwargs)]){sizes}"
    if mismatch.kind == "host" and mismatch.is_absent:
        return ". The first call fills it: run the model once before planning"
    return ""


def failed_audit(model: nn.Module, different: Sequence[str], num_runs: int, strict: bool) -> Mismatch:
    """Why no call runs planned any more, after an audit found other results.

    Args:
        different: names of what differs.
        num_runs: the planned calls so far, the audited one included.

    Raises:
        PlanAuditError: `strict`.
    """
    names = ", ".join(different[:5])
    what = f"the planned forward gave another {names} than the model's own, at planned call {num_runs}"
    if strict:
        raise PlanAuditError(f"{type(model).__name__}: {what}. Train unplanned, and please report the model")
    return Mismatch("audit", "the audit", text=f"the audit: {what}; please report it with the model")


def summary(plan: Plan, num_others: int) -> str:
    """A plan in one line.

    Args:
        num_others: number of further plans of the same model.
    """
    peaks = f"peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.plain.peak_bytes)}"
    more = f", and {num_others} more" if num_others else ""
    return f"planned for {format_bytes(plan.budget_bytes)}: {peaks}, time {plan.overhead:+.1%}{more}"
