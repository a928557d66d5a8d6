"""Plan which activations to recompute so that a training step fits a byte budget, bit for bit.

Names are imported when they are asked for: `planner solve` and `import planner.solver` work where torch is missing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import apply, plan, sweep
    from planner.batch import max_batch
    from planner.children import Children, plan_children
    from planner.errors import (
        BackwardError,
        BudgetError,
        CaptureError,
        CompileError,
        ExportError,
        InfeasibleBudgetError,
        InputError,
        MeasuredPeakError,
        NoScheduleFoundError,
        PlanAuditError,
        PlanCheckError,
        PlanFileError,
        PlanMissError,
        PlannerError,
        PlotMissingError,
        RanksDifferError,
        SolverMissingError,
        UnsupportedTorchError,
    )
    from planner.export.source import export_source
    from planner.profiler.devices import devices, register_device
    from planner.profiler.estimate import DeviceModel
    from planner.results.max_batch import MaxBatch
    from planner.results.plan import Plan
    from planner.results.sweep import Sweep
    from planner.results.verify_report import VerifyReport
    from planner.results.verify_report import VerifyReport as Report
    from planner.runtime.install import install, uninstall
    from planner.runtime.module import CheckpointedModule
    from planner.runtime.reporting import PlanMissWarning
    from planner.verification.verify import verify

_HOMES = {
    "planner.api": ("apply", "plan", "sweep"),
    "planner.batch": ("max_batch",),
    "planner.children": ("Children", "plan_children"),
    "planner.errors": (
        "BackwardError",
        "BudgetError",
        "CaptureError",
        "CompileError",
        "ExportError",
        "InfeasibleBudgetError",
        "InputError",
        "MeasuredPeakError",
        "NoScheduleFoundError",
        "PlanAuditError",
        "PlanCheckError",
        "PlanFileError",
        "PlanMissError",
        "PlannerError",
        "PlotMissingError",
        "RanksDifferError",
        "SolverMissingError",
        "UnsupportedTorchError",
    ),
    "planner.runtime.install": ("install", "uninstall"),
    "planner.results.plan": ("Plan",),
    "planner.profiler.devices": ("devices", "register_device"),
    "planner.profiler.estimate": ("DeviceModel",),
    "planner.results.max_batch": ("MaxBatch",),
    "planner.results.sweep": ("Sweep",),
    "planner.runtime.module": ("CheckpointedModule",),
    "planner.runtime.reporting": ("PlanMissWarning",),
    "planner.export.source": ("export_source",),
    "planner.verification.verify": ("verify",),
    "planner.results.verify_report": ("VerifyReport",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_FORMER = {"Report": "VerifyReport"}
"""Names in earlier development versions."""

__all__ = [
    "BackwardError",
    "BudgetError",
    "CaptureError",
    "CheckpointedModule",
    "Children",
    "CompileError",
    "DeviceModel",
    "ExportError",
    "InfeasibleBudgetError",
    "InputError",
    "MaxBatch",
    "MeasuredPeakError",
    "NoScheduleFoundError",
    "Plan",
    "PlanAuditError",
    "PlanCheckError",
    "PlanFileError",
    "PlanMissError",
    "PlanMissWarning",
    "PlannerError",
    "PlotMissingError",
    "RanksDifferError",
    "Report",
    "SolverMissingError",
    "Sweep",
    "UnsupportedTorchError",
    "VerifyReport",
    "apply",
    "devices",
    "export_source",
    "install",
    "max_batch",
    "plan",
    "plan_children",
    "register_device",
    "sweep",
    "uninstall",
    "verify",
]


def __getattr__(name: str) -> Any:
    here = _FORMER.get(name, name)
    if here not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    value = getattr(import_module(_HOME[here]), here)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
