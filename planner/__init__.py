"""Plan which activations to recompute so that a training step fits a byte budget, bit for bit."""

from planner.api import apply, plan
from planner.errors import (
    BackwardError,
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    InputError,
    NoScheduleFoundError,
    PlanFileError,
    PlannerError,
    SolverMissingError,
)
from planner.graph.plan import Plan
from planner.rewriter.module import CheckpointedModule, PlanMissWarning
from planner.verify import Report, verify

__all__ = [
    "BackwardError",
    "BudgetError",
    "CaptureError",
    "CheckpointedModule",
    "InfeasibleBudgetError",
    "InputError",
    "NoScheduleFoundError",
    "Plan",
    "PlanFileError",
    "PlanMissWarning",
    "PlannerError",
    "Report",
    "SolverMissingError",
    "apply",
    "plan",
    "verify",
]
