"""plan_at_first_call: a model that plans itself for its first call in training, whatever loop calls it."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn

from planner import arguments, units
from planner.analysis.budgets import Budget
from planner.api import plan
from planner.errors import InputError, warn
from planner.options import PlanKeywords, read_options, with_options
from planner.profiler.optimizer import state_bytes
from planner.report.progress import in_lines
from planner.runtime.garbage import collected
from planner.runtime.install import PlannedForward, install, uninstall
from planner.runtime.module import CheckpointedModule
from planner.runtime.planned_call import runs_as_planned
from planner.tracer.capture import IS_CAPTURING
from planner.tracer.copies import with_left_tensors

Call = Callable[..., Any]


@dataclass(slots=True)
class PlannedAtFirstCall:
    """A model that has planned itself.

    Attributes:
        module: the planned module; `module.plan` is the Plan.
        seconds: wall clock that the first call waited for it.
        told_s: seconds of captures of other sizes that `new_pauses` has returned.
    """

    module: CheckpointedModule
    seconds: float
    told_s: float = 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """What a trainer logs, by name: seconds, bytes, and fractions of the plain step's time."""
        made = self.module.plan
        return {
            "planner/seconds": self.seconds,
            "planner/budget_bytes": made.budget_bytes,
            "planner/plain_peak_bytes": made.plain.peak_bytes,
            "planner/peak_bytes": made.peak_bytes,
            "planner/overhead": made.overhead,
            "planner/gap": made.gap,
        }

    def new_pauses(self) -> dict[str, float]:
        """What a trainer logs of the captures of other sizes since the last call of this function; empty if there were none."""
        stats = self.module.stats()
        if stats.planning_s <= self.told_s:
            return {}
        self.told_s = stats.planning_s
        return {"planner/other_sizes": len(stats.pauses), "planner/other_sizes_seconds": stats.planning_s}


class FirstCall:
    """Replaces `model.forward` until the first call in training: plans for that call, installs the plan, and runs it planned.

    A trainer adds arguments, casts, moves tensors and puts autocast around the forward: seen from inside the call, nothing of
    that has to be known. What was put around the forward meanwhile stays there. Earlier calls (a validation pass, `generate`)
    run the forward that it replaces, and so does every call if planning fails.

    Args:
        make: returns the planned module for a call, given its args and kwargs; None: nothing is planned any more.
        before: the instance's `forward` attribute that it replaces; None if there was none.
        strict: an error of `make` is raised instead of given to `failed`.
        done: is given what was planned.
        failed: is given the error where nothing could be planned.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[Any, Any], CheckpointedModule] | None,
        before: Call | None,
        strict: bool = False,
        done: Callable[[PlannedAtFirstCall], None] = lambda planned: None,
        failed: Callable[[Exception], None] = lambda error: None,
        installed: PlannedForward | None = None,
    ) -> None:
        self._model, self._make, self._before, self._strict = model, make, before, strict
        self._done, self._failed, self._installed = done, failed, installed

    @property
    def unplanned(self) -> Call:
        """The forward that it replaces."""
        before = self._before
        return before if before is not None else type(self._model).forward.__get__(self._model)

    @property
    def planned(self) -> CheckpointedModule | None:
        """The planned module; None before it is planned, and where it cannot be."""
        return None if self._installed is None else self._installed.planned[0]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unplanned)

    @runs_as_planned
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Plan, if this is the first call in training; then run the call."""
        if self._make is not None and not IS_CAPTURING.get() and self._model.training and torch.is_grad_enabled():
            make, self._make = self._make, None
            self._plan(make, args, kwargs)
        return (self._installed or self.unplanned)(*args, **kwargs)

    def _plan(self, make: Callable[[Any, Any], CheckpointedModule], args: Any, kwargs: Any) -> None:
        """Plan for this call and install the plan, with the forward as it was; then put back what was put around it."""
        own = vars(self._model)
        outer = own.get("forward")
        begun = time.monotonic()
        _set_forward(self._model, self._before)
        try:
            with _lines_on_first_rank(), collected():
                module = make(args, kwargs)
            install(self._model, module, strict=self._strict)
            self._installed = own["forward"]
        except Exception as error:
            if self._strict:
                self._make = make  # the next call fails as well, and does not run unplanned in silence
                raise
            self._failed(error)
        else:
            self._done(PlannedAtFirstCall(module, time.monotonic() - begun))
        finally:
            if outer is not self:
                _set_forward(self._model, outer)

    def stop(self) -> None:
        """Plan nothing any more, and make the model train unplanned: its forward is what it was."""
        self._make, installed, self._installed = None, self._installed, None
        forward = vars(self._model).get("forward")
        if forward is self:
            _set_forward(self._model, self._before)
        elif forward is installed is not None:
            uninstall(self._model)

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstCall:
        """A copy of the model plans nothing by itself; where the model is planned, its copy is too."""
        model = copy.deepcopy(self._model, with_left_tensors(self._model, memo))
        before, installed = copy.deepcopy((self._before, self._installed), memo)
        return FirstCall(model, None, before, self._strict, installed=installed)

    def __reduce__(self) -> tuple[Any, ...]:
        none = _nothing
        return FirstCall, (self._model, None, self._before, self._strict, none, none, self._installed)


def _lines_on_first_rank() -> AbstractContextManager[Any]:
    """Say in lines what a training without a terminal waits for; of several ranks, the first says it."""
    world = torch.distributed
    is_first = not (world.is_available() and world.is_initialized()) or world.get_rank() == 0
    return in_lines() if is_first else nullcontext()


def watch(
    model: nn.Module,
    make: Callable[[Any, Any], CheckpointedModule],
    strict: bool,
    done: Callable[[PlannedAtFirstCall], None],
    failed: Callable[[Exception], None],
) -> FirstCall:
    """Let a model be planned at its first call in training; arguments as of `FirstCall`.

    What watches the model already is stopped, with a warning.
    """
    earlier = vars(model).get("forward")
    if isinstance(earlier, FirstCall):
        warn(
            f"{type(model).__name__} was to be planned at its first call by another callback, or by plan_at_first_call: that "
            "is stopped, and the later one plans it. Use one of them, or stop() the earlier one"
        )
        earlier.stop()
    first = FirstCall(model, make, vars(model).get("forward"), strict, done, failed)
    _set_forward(model, first)
    return first


def checked_options(budget: Budget, options: PlanKeywords, function: str) -> PlanKeywords:
    """Options for training inside of a loop: other sizes are captured as they come, unless `dynamic=False`.

    Raises:
        TypeError, BudgetError, InputError: a budget or an option that no model could be planned with.
    """
    units.check_budget(budget)
    read_options(options, PlanKeywords, function)
    return {"dynamic": True, **options}


def unwrapped(optimizer: Any) -> Any:
    """An optimizer without accelerate's wrapper around it."""
    return getattr(optimizer, "optimizer", optimizer)


def counted_optimizers(model: nn.Module, optimizers: Iterable[Any]) -> tuple[Any, ...]:
    """Those of a trainer's optimizers whose state can be counted against the budget; warns of the others."""
    counted = []
    for optimizer in map(unwrapped, optimizers):
        try:
            state_bytes(model, optimizer)
        except InputError as error:
            warn(f"the budget does not count the state of {type(optimizer).__name__}: {error}")
        else:
            counted.append(optimizer)
    return tuple(counted)


def warn_unplanned(model: nn.Module, error: Exception) -> None:
    """Warn that a model trains as it is, and why."""
    warn(f"{type(model).__name__} trains unplanned, as it would without the planner: {type(error).__name__}: {error}")


@with_options(PlanKeywords)
def plan_at_first_call(
    model: nn.Module, budget: Budget, *, log: Callable[[str], Any] = print, **options: Unpack[PlanKeywords]
) -> FirstCall:
    """Let a model plan itself at its first call in training; that call already runs planned.

    For loops that decide themselves what they call the model with. Nothing is captured before, evaluation and `generate` run
    the model's own forward, and inputs of other sizes are captured when they first come. If the call cannot be planned, a
    warning says why, and the model trains as it is.

    Args:
        model: as the loop holds it; of a DistributedDataParallel model, the one that it wraps is planned.
        budget: as for `planner.plan`.
        log: is given the plan's table, once.
        options: see below; `dynamic` is True unless given.

    Returns:
        its `stop()` undoes everything.

    Raises:
        TypeError, BudgetError, InputError: a budget or an option that no model could be planned with.
        PlannerError: at the first call, with `strict=True`: it cannot be planned.
    """
    arguments.check_model(model)
    given = checked_options(budget, options, "plan_at_first_call")
    given["optimizer"] = unwrapped(given.get("optimizer"))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module

    def make(args: Any, kwargs: Any) -> CheckpointedModule:
        return plan(model, budget, args, kwargs, **given)

    def done(planned: PlannedAtFirstCall) -> None:
        log(str(planned.module.plan))

    def failed(error: Exception) -> None:
        warn_unplanned(model, error)

    return watch(model, make, given.get("strict", False), done, failed)


def _nothing(_: Any) -> None:
    """What a copy of the model tells of its planning."""


def _set_forward(model: nn.Module, forward: Any) -> None:
    """Set the instance's `forward` attribute; None removes it."""
    if forward is None:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = forward
