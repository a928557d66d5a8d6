"""One model in one precision: trained plain and planned from the same state, and judged."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.field.case import Batch, Case, seed_all
from benchmarks.field.loop import BUDGET, SEED, SOLVER_S, Trajectory, cast, first_difference, fresh, train
from benchmarks.field.outcome import Outcome
from benchmarks.field.peak import resident_bytes, step_peak
from benchmarks.field.state import differences, generators, module_state, same
from benchmarks.field.units import in_units
from planner import CaptureError, InfeasibleBudgetError, MeasuredPeakError, NoScheduleFoundError, PlannerError, plan

ABOVE_THE_FLOOR = (1.0, 1.002, 1.02, 1.1)
ABOVE_THE_MEASURED = 1.1
"""Of a measured peak that was above the budget: by about as much the error raises it."""


def check(case: Case, precision: str, stage: Callable[[str], None] = lambda name: None) -> Outcome:
    """Plan a model, train it beside its plain copy, and compare; `stage` is told what comes next."""
    base = Outcome(case.name, precision, "broken", version=_version(case.requirement), torch=torch.__version__)
    stage("eager")
    case.build()  # what packages keep from the first time on (parsed sources, caches) is there for all that follow
    eager, again = (_eager(case, precision) for _ in range(2))
    if eager.error is not None or again.error is not None:
        return replace(base, reason=f"eager: {failure(eager.error or again.error)}")
    unstable = first_difference(eager, again)
    if unstable:
        return replace(base, reason=f"eager differs from itself: {unstable}")
    stage("planning")
    start = time.perf_counter()
    setup, model = fresh(case)
    before = module_state(model) | generators_seeded()
    try:
        planned, notes = _planned(setup, model, precision)
    except Exception as error:
        base = replace(base, reason=failure(error), seconds=time.perf_counter() - start)
        if not isinstance(error, PlannerError):
            return replace(base, outcome="crashed")
        verdict = _judge_refusal(base, eager, case, setup, model, precision, stage)
        if verdict.outcome == "refused" and isinstance(error, CaptureError):  # whose message advises plan_units
            stage("planning in units")
            verdict = in_units(verdict, eager, case, precision)
        return verdict
    base = replace(base, seconds=time.perf_counter() - start, steps=len(setup.batches), notes=notes, **_figures(planned))
    changed = _changed_by_planning(before, module_state(model) | generators(), eager)
    if changed:
        return replace(base, outcome="different", reason=f"planning changed {', '.join(changed[:4])}")
    stage("training")
    run = train(setup, planned, precision, _why_unplanned(planned, precision))
    base = replace(base, planned_steps=run.misses.count(""), notes="; ".join(filter(None, [notes, *run.warned])))
    verdict = _judge(base, eager, run)
    stage("eager after planning")
    if verdict.outcome in ("exact", "unplanned"):
        verdict = _judge_afterwards(verdict, eager, case, precision)
    if verdict.outcome == "exact":
        stage("measuring")
        verdict = _judge_peak(verdict, case, setup, planned, precision)
    return verdict


def generators_seeded() -> dict[str, Any]:
    """Set the generators for planning; their states."""
    seed_all(SEED)
    return generators()


def _changed_by_planning(before: dict[str, Any], after: dict[str, Any], eager: Trajectory) -> list[str]:
    """What planning changed, beside what the first step of eager leaves so, too (such as a cache that is filled once)."""
    first = eager.steps[0]
    kept = {name: value for name, value in after.items() if not (name in first and same(value, first[name]))}
    kept |= {name: value for name, value in after.items() if name.endswith("'s generator")}
    return [text.replace("in eager", "before") for text in differences({name: before.get(name) for name in kept}, kept)]


def _eager(case: Case, precision: str) -> Trajectory:
    setup, model = fresh(case)
    return train(setup, model, precision)


def _planned(setup: Any, model: Any, precision: str) -> tuple[Any, str]:
    """Planned for the budget, or for the least that can be had; and how far the budget was raised."""
    first = setup.batches[0]

    def planned_for(budget: int | float) -> Any:
        with cast(precision):
            return plan(model, budget, first.args, first.kwargs, progress=False, effort=SOLVER_S, **dict(setup.plan))

    try:
        return planned_for(BUDGET), ""
    except MeasuredPeakError as error:
        return planned_for(int(error.peak_bytes * ABOVE_THE_MEASURED)), "raised above the measured peak, as the error advises"
    except InfeasibleBudgetError as error:
        floor_bytes = error.floor_bytes
    except NoScheduleFoundError:
        return planned_for(1.0), "no schedule found for the budget; planned for the plain peak"
    for factor in ABOVE_THE_FLOOR:
        try:
            note = "raised to the floor" + (f" and {factor - 1:.1%}" if factor > 1 else "")
            return planned_for(int(floor_bytes * factor)), note
        except (InfeasibleBudgetError, NoScheduleFoundError, MeasuredPeakError):
            continue
    return planned_for(1.0), "raised to the plain peak"


def _why_unplanned(planned: Any, precision: str) -> Callable[[Batch], str]:
    """What keeps a call from running planned, by the planned module itself."""

    def why(batch: Batch) -> str:
        with cast(precision):
            miss = planned.mismatch(batch.args, batch.kwargs)
        return "" if miss is None else str(miss)

    return why


def _figures(planned: Any) -> dict[str, Any]:
    plan = planned.plan
    return {
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.peak_bytes,
        "overhead": plan.overhead,
        "opaque": ", ".join(plan.provenance.opaque),
    }


def _judge(base: Outcome, eager: Trajectory, run: Trajectory) -> Outcome:
    different = first_difference(eager, run)
    if different:
        return replace(base, outcome="different", reason=different)
    if run.error is not None:
        outcome = "refused" if isinstance(run.error, PlannerError) else "crashed"
        return replace(base, outcome=outcome, reason=f"step {len(run.steps)}: {failure(run.error)}")
    if any(run.misses):
        step = next(i for i, miss in enumerate(run.misses) if miss)
        return replace(base, outcome="unplanned", reason=f"step {step}: {run.misses[step]}")
    return replace(base, outcome="exact")


def _judge_refusal(
    base: Outcome, eager: Trajectory, case: Case, setup: Any, model: Any, precision: str, stage: Callable[[str], None]
) -> Outcome:
    """A refused model must train as if nobody had tried."""
    stage("training after a refusal")
    run = train(setup, model, precision)
    refusal = base.reason
    if run.error is not None:
        return replace(base, outcome="crashed", reason=f"after the refusal ({refusal}): {failure(run.error)}")
    different = first_difference(eager, run)
    if different:
        return replace(base, outcome="different", reason=f"after the refusal ({refusal}): {different}")
    return _judge_afterwards(replace(base, outcome="refused"), eager, case, precision)


def _judge_afterwards(verdict: Outcome, eager: Trajectory, case: Case, precision: str) -> Outcome:
    """Another plain copy must train as before: planning may leave nothing behind."""
    later = _eager(case, precision)
    if later.error is not None:
        return replace(verdict, outcome="crashed", reason=f"eager after planning: {failure(later.error)}")
    different = first_difference(eager, later)
    return replace(verdict, outcome="different", reason=f"eager after planning: {different}") if different else verdict


def _judge_peak(verdict: Outcome, case: Case, setup: Any, planned: Any, precision: str) -> Outcome:
    """The measured peak against the budget; not measured where another step would not run planned."""
    resident = resident_bytes(planned)
    plain_bytes = resident + step_peak(*fresh(case), precision)
    if _why_unplanned(planned, precision)(setup.batches[0]):
        return replace(verdict, plain_bytes=plain_bytes, notes=f"{verdict.notes}; peak not measured".strip("; "))
    peak_bytes = resident + step_peak(setup, planned, precision)
    verdict = replace(verdict, plain_bytes=plain_bytes, peak_bytes=peak_bytes)
    if peak_bytes > verdict.budget_bytes:
        over = f"{peak_bytes} bytes measured, {verdict.predicted_bytes} predicted, {verdict.budget_bytes} in the budget"
        return replace(verdict, outcome="over budget", reason=over)
    return verdict


def failure(error: BaseException | None) -> str:
    """Class, message, and the innermost line; of the planner, too, unless it is the planner's own error."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    if isinstance(error, PlannerError) or not frames:
        return text
    inner = [f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    ours = [line for line, frame in zip(inner, frames, strict=True) if "/planner/" in frame.filename]
    return f"{text} [{inner[-1]}{f'; {ours[-1]}' if ours else ''}]"


def _version(requirement: str) -> str:
    try:
        return metadata.version(requirement)
    except metadata.PackageNotFoundError:
        return ""
