"""Plan which activations to recompute so that a training step fits a byte budget, bit for bit.

Names are imported when they are first used: `import planner` imports no torch, and `planner solve` works where it is missing.
"""

# ruff: noqa: I001 (ruff would give each `name as name` a statement of its own)

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# `name as name` is how type checkers are told that a name is public
from planner.errors import (
    BackwardError as BackwardError,
    BudgetError as BudgetError,
    CaptureError as CaptureError,
    CompileError as CompileError,
    ExportError as ExportError,
    GraphError as GraphError,
    InfeasibleBudgetError as InfeasibleBudgetError,
    InputError as InputError,
    MeasuredPeakError as MeasuredPeakError,
    MismatchError as MismatchError,
    NoScheduleFoundError as NoScheduleFoundError,
    OpaqueModuleError as OpaqueModuleError,
    PlanAuditError as PlanAuditError,
    PlanCheckError as PlanCheckError,
    PlanFileError as PlanFileError,
    PlannerError as PlannerError,
    PlotMissingError as PlotMissingError,
    RanksDifferError as RanksDifferError,
    ScheduleError as ScheduleError,
    SolverMissingError as SolverMissingError,
    UnsupportedTorchError as UnsupportedTorchError,
)

if TYPE_CHECKING:
    from planner.api import apply as apply, estimate as estimate, plan as plan, profile as profile, sweep as sweep
    from planner.batch import max_batch as max_batch
    from planner.children import plan_children as plan_children
    from planner.composite.planned import PlannedUnits as PlannedUnits
    from planner.composite.units import apply_units as apply_units, plan_units as plan_units
    from planner.diagnosis import doctor as doctor
    from planner.export.source import export_source as export_source
    from planner.integrations.first_call import plan_at_first_call as plan_at_first_call
    from planner.options import PlanOptions as PlanOptions
    from planner.profiled import ProfiledStep as ProfiledStep
    from planner.profiler.devices import devices as devices, register_device as register_device
    from planner.profiler.estimate import DeviceModel as DeviceModel
    from planner.results.call_stats import CallStats as CallStats
    from planner.results.diagnosis import Diagnosis as Diagnosis
    from planner.results.estimate import Estimate as Estimate
    from planner.results.explanation import Explanation as Explanation
    from planner.results.max_batch import MaxBatch as MaxBatch
    from planner.results.plan import Plan as Plan
    from planner.results.sweep import Sweep as Sweep
    from planner.results.unit_plan import UnitPlan as UnitPlan
    from planner.results.verify_report import VerifyReport as VerifyReport
    from planner.runtime.install import install as install, uninstall as uninstall, unplan as unplan
    from planner.runtime.module import CheckpointedModule as CheckpointedModule
    from planner.runtime.reporting import MismatchWarning as MismatchWarning
    from planner.verification.verify import verify as verify

    __version__: str

_HOMES = {
    "planner.api": ("apply", "estimate", "plan", "profile", "sweep"),
    "planner.batch": ("max_batch",),
    "planner.children": ("plan_children",),
    "planner.composite.planned": ("PlannedUnits",),
    "planner.composite.units": ("apply_units", "plan_units"),
    "planner.diagnosis": ("doctor",),
    "planner.export.source": ("export_source",),
    "planner.integrations.first_call": ("plan_at_first_call",),
    "planner.options": ("PlanOptions",),
    "planner.profiled": ("ProfiledStep",),
    "planner.profiler.devices": ("devices", "register_device"),
    "planner.profiler.estimate": ("DeviceModel",),
    "planner.results.call_stats": ("CallStats",),
    "planner.results.diagnosis": ("Diagnosis",),
    "planner.results.estimate": ("Estimate",),
    "planner.results.explanation": ("Explanation",),
    "planner.results.max_batch": ("MaxBatch",),
    "planner.results.plan": ("Plan",),
    "planner.results.sweep": ("Sweep",),
    "planner.results.unit_plan": ("UnitPlan",),
    "planner.results.verify_report": ("VerifyReport",),
    "planner.runtime.install": ("install", "uninstall", "unplan"),
    "planner.runtime.module": ("CheckpointedModule",),
    "planner.runtime.reporting": ("MismatchWarning",),
    "planner.verification.verify": ("verify",),
}
"""Where public names live, errors aside."""
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_FORMER = {
    "Children": "PlannedUnits",
    "PartError": "OpaqueModuleError",
    "PlanMissError": "MismatchError",
    "PlanMissWarning": "MismatchWarning",
    "Report": "VerifyReport",
}
"""Names of the last release, and what they are called now."""

__all__ = sorted([*_HOME, *(name for name, it in globals().items() if isinstance(it, type) and issubclass(it, PlannerError))])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _FORMER:
        warnings.warn(f"planner.{name} is now planner.{_FORMER[name]}", DeprecationWarning, stacklevel=2)
        return getattr(import_module("planner"), _FORMER[name])
    if name not in _HOME:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    """The version of the installed package; "0+unknown" for a source tree that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("checkpoint-planner")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
