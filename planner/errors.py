"""Every error the planner raises on purpose. Each says what, where, the numbers, and what to do."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class PlannerError(Exception):
    """Base class: catch this to train unplanned when planning is not possible."""


class BudgetError(PlannerError, ValueError):
    """A budget, byte size or range is invalid."""


class InfeasibleBudgetError(PlannerError):
    """No schedule of this graph fits the budget.

    Attributes:
        budget_bytes: what was asked for.
        floor_bytes: the least any schedule of this graph, in its captured backward order, can reach.
        culprit: the op that holds it, and what it holds: "op mm_3, h.0, holds 12 MiB while it runs: ..."; "" without ops.
        advice: what would lower it: "reduce the batch (half of it needs about ...), or ...".
    """

    def __init__(self, message: str, *, budget_bytes: int, floor_bytes: int, culprit: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes
        self.culprit, self.advice = culprit, advice


class NoScheduleFoundError(PlannerError):
    """No schedule was found with the effort given; the budget was not proven infeasible.

    Attributes:
        lowest_bytes: the lowest peak that was found; None where nothing was searched.
        floor_bytes: no schedule has a lower peak than this.
        solve_s: wall seconds spent.
    """

    def __init__(self, message: str, *, lowest_bytes: int | None = None, floor_bytes: int = 0, solve_s: float = 0.0) -> None:
        super().__init__(message)
        self.lowest_bytes, self.floor_bytes, self.solve_s = lowest_bytes, floor_bytes, solve_s


class SolverMissingError(PlannerError):
    """HiGHS (highspy) cannot be run."""


class UnsupportedTorchError(PlannerError, ImportError):
    """The installed torch does not have a private name that this package uses.

    Attributes:
        missing: dotted names.
        found: the installed release.
        supported: the releases that have them all, as a version specifier.
    """

    def __init__(self, message: str, *, missing: tuple[str, ...] = (), found: str = "", supported: str = "") -> None:
        super().__init__(message)
        self.missing, self.found, self.supported = missing, found, supported


class GraphError(PlannerError):
    """A Graph is malformed (an op reads a value nobody wrote, a name occurs twice, ...)."""


class ScheduleError(PlannerError):
    """A Schedule cannot run on its Graph (a read before its write, a forbidden recompute, ...)."""


class PlanFileError(PlannerError):
    """A plan file is corrupt, of an unknown version, or made for another model."""


class CaptureError(PlannerError):
    """The model cannot be captured as one joint graph; the model is left as it was.

    Attributes:
        module: qualified name of the submodule that stands in the way; "" where it is the model itself or unknown.
        is_models_own: the model's forward raises the same without the planner; `__cause__` is what it raises.
    """

    def __init__(self, message: str, *, module: str = "", is_models_own: bool = False) -> None:
        super().__init__(message)
        self.module, self.is_models_own = module, is_models_own


class InputError(PlannerError, ValueError):
    """An argument is invalid, or the model cannot be planned as given (mode, device, no gradients, ...)."""


class MismatchError(PlannerError, RuntimeError):
    """A training call is not the one that was planned for; names what differs.

    With strict=True; and always where the model's own forward would not give eager's results either, as an earlier planned call
    has cast its weights (planner/runtime/autocast_regions.py).
    """


class PlanAuditError(PlannerError, RuntimeError):
    """With strict=True: the planned forward gave other results than the model's own, twice; names the outputs. A bug report."""


class BackwardError(PlannerError, RuntimeError):
    """Backward was called for something the plan does not cover (another output, a second derivative)."""


class OpaqueModuleError(PlannerError, RuntimeError):
    """An opaque module of a planned model returned something else than when it was planned, or wrote into its arguments."""


class RanksDifferError(PlannerError, RuntimeError):
    """Ranks that communicate inside a planned step run different plans of it, or one of them does not come to it."""


class ExportError(PlannerError):
    """A planned step cannot be written out as a file that needs torch alone; says which part of it, and what to do."""


class CompileError(PlannerError):
    """With compile=True: inductor cannot compile the planned step, or what it made of it does not fit the budget."""


class MeasuredPeakError(PlannerError):
    """The planned step was run, and needs more of the device's memory than the budget.

    Attributes:
        budget_bytes: what was asked for.
        peak_bytes: what was measured.
    """

    def __init__(self, message: str, *, budget_bytes: int, peak_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.peak_bytes = peak_bytes


class PlanCheckError(PlannerError):
    """The planned step was run once at the end of `plan`, and failed or gave other results: a fault of the planner."""


class PlotMissingError(PlannerError):
    """matplotlib is not installed; the extra `plot` brings it."""


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300].rstrip('.')}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost running line that is neither this package's nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("planner", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
