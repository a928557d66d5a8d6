"""A model that is refused as a whole: its submodules planned by `plan_units`, as the refusal advises, and judged alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.field.case import Batch, Case, seed_all
from benchmarks.field.loop import BUDGET, SEED, SOLVER_S, Trajectory, cast, first_difference, fresh, train
from benchmarks.field.outcome import Outcome
from benchmarks.field.peak import step_peak
from planner import InfeasibleBudgetError, NoScheduleFoundError, PlannerError, plan_units


def in_units(refused: Outcome, eager: Trajectory, case: Case, precision: str) -> Outcome:
    """What comes of the submodules; the refusal, with one more reason, where none can be planned."""
    setup, model = fresh(case)
    seed_all(SEED)
    try:
        with cast(precision):
            planned = _planned(model, setup.batches[0], setup.plan.get("loss"))
    except PlannerError as error:
        return replace(refused, notes=f"plan_units: {type(error).__name__}: {' '.join(str(error).split())}"[:600])
    except Exception as error:
        return replace(refused, outcome="crashed", reason=f"plan_units: {type(error).__name__}: {error}"[:600])
    run = train(setup, model, precision)
    unplanned = sum(unit.num_unplanned_calls for unit in planned.planned.values())
    judged = replace(
        refused,
        outcome="in units",
        steps=len(setup.batches),
        planned_steps=run.misses.count("") if unplanned else len(run.steps),
        budget_bytes=planned.budget_bytes,
        predicted_bytes=planned.plan.peak_bytes,
        units=len(planned.planned),
    )
    different = first_difference(eager, run)
    if different:
        return replace(judged, outcome="different", reason=f"in units: {different}")
    if run.error is not None:
        outcome = "refused" if isinstance(run.error, PlannerError) else "crashed"
        return replace(judged, outcome=outcome, reason=f"in units, step {len(run.steps)}: {run.error}")
    if unplanned:
        return judged
    resident = _resident_bytes(model, setup.batches[0])
    peak_bytes = resident + step_peak(setup, model, precision)
    judged = replace(judged, peak_bytes=peak_bytes, plain_bytes=resident + step_peak(*fresh(case), precision))
    if peak_bytes > planned.budget_bytes:
        return replace(
            judged, outcome="over budget", reason=f"in units: {peak_bytes} bytes, {planned.budget_bytes} in the budget"
        )
    return judged


def _planned(model: nn.Module, batch: Batch, loss: Any) -> Any:
    """Planned for the budget, or for the least that there is."""

    def planned_for(budget: int | float) -> Any:
        return plan_units(model, budget, batch.args, batch.kwargs, loss=loss, progress=False, effort=SOLVER_S)

    try:
        return planned_for(BUDGET)
    except (InfeasibleBudgetError, NoScheduleFoundError):
        return planned_for(1.0)


def _resident_bytes(model: nn.Module, batch: Batch) -> int:
    """What is there before a step: parameters, buffers and the batch."""
    leaves = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((batch.args, dict(batch.kwargs)))]
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves if hasattr(leaf, "data_ptr")
    }
    return sum(storages.values())
