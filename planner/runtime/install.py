"""install, uninstall, unplan: `model.forward` runs planned; everything else about the user's model stays as it is."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from planner import arguments
from planner.errors import InputError
from planner.results.plan import Plan
from planner.runtime.autocast_regions import note_unplanned
from planner.runtime.criterion import WithCriterion
from planner.runtime.executable import Executable
from planner.runtime.guards.mismatch import Mismatch
from planner.runtime.module import CheckpointedModule
from planner.runtime.other_sizes import larger_than_all
from planner.runtime.planned_call import runs_as_planned
from planner.runtime.reporting import report_mismatch
from planner.runtime.step import RewrittenStep
from planner.tracer.capture import IS_CAPTURING
from planner.tracer.copies import with_left_tensors


class PlannedForward:
    """Replaces `model.forward` while plans are installed. It belongs to one model; a copy of the model gets its own.

    Args:
        plans: (step, plan, code that copies can share, audits) of each planned module.
        before: the instance's `forward` attribute that it replaces; None if there was none.
        strict: a training call that no plan was made for is an error.
        planned: the planned modules. A copy of the model makes its own from `plans` at its first call, because it is not yet
            complete while it is copied or unpickled.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[tuple[RewrittenStep, Plan, Executable | None, bool]],
        before: Callable[..., Any] | None,
        strict: bool,
        planned: Sequence[CheckpointedModule] = (),
    ) -> None:
        self._model, self._plans, self._before, self._strict = model, tuple(plans), before, strict
        self._planned = list(planned)
        self._warned: set[str] = set()

    @property
    def unplanned(self) -> Callable[..., Any]:
        """The forward that it replaces, which runs every call that no plan was made for."""
        before = self._before
        return before if before is not None else type(self._model).forward.__get__(self._model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unplanned)

    @property
    def planned(self) -> list[CheckpointedModule]:
        """The planned modules, in the order in which they are tried."""
        if not self._planned:
            strict = self._strict
            self._planned = [
                CheckpointedModule(self._model, step, plan, strict, executable=executable, audits=audits)
                for step, plan, executable, audits in self._plans
            ]
        first, *others = self._planned
        for other in others:  # their forwards wait beside those of the first
            other.__dict__["_in_flight"] = first.__dict__["_in_flight"]
        return self._planned

    @runs_as_planned
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the first plan that was made for this call, else the model's own forward."""
        if IS_CAPTURING.get():
            return self.unplanned(*args, **kwargs)
        with self._outermost():
            # what one of several plans was made for is not captured as another size of the first
            for captures in (True,) if len(self.planned) == 1 else (False, True):
                mismatches: list[Mismatch] = []
                for module in self.planned:
                    planned, mismatch = module.attempt(args, kwargs, unplanned=self.unplanned, captures=captures)
                    if mismatch is None:
                        return planned
                    mismatches.append(mismatch)
        for module, mismatch in zip(self.planned, mismatches, strict=True):
            module.count_unplanned(mismatch)
        steps = [one.step for module in self.planned for one in (module, *module.alternatives)]
        larger = larger_than_all(steps, args, kwargs)
        report_mismatch(
            self._model,
            mismatches[0],
            self._warned,
            self._strict,
            num_plans=len(mismatches),
            larger=larger,
            is_unit=bool(self.planned[0].plan.num_calls),
        )
        note_unplanned([*self._model.parameters()], self.planned[0].device)
        return self.unplanned(*args, **kwargs)

    @contextlib.contextmanager
    def _outermost(self) -> Iterator[None]:
        """Take off, for a moment, what was put around `model.forward` after this: the call is inside of it already.

        A capture of another size would otherwise enter it twice, and an instance of torch.autocast that is entered twice, as
        accelerate's would be, stays on for ever.
        """
        own = vars(self._model)
        outer = own.get("forward")
        own["forward"] = self
        try:
            yield
        finally:
            if outer is None:
                del own["forward"]
            else:
                own["forward"] = outer

    def restore(self) -> None:
        """Put back the forward that it replaces."""
        if self._before is not None:
            vars(self._model)["forward"] = self._before
        else:
            del vars(self._model)["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        model, before = copy.deepcopy(self._model, with_left_tensors(self._model, memo)), copy.deepcopy(self._before, memo)
        return PlannedForward(model, self._plans, before, self._strict)

    def __reduce__(self) -> tuple[Any, ...]:
        plans = [
            (step, plan, None, audits) for step, plan, _, audits in self._plans
        ]  # code is generated again where it is loaded
        return PlannedForward, (self._model, plans, self._before, self._strict)


def install(model: nn.Module, *planned: CheckpointedModule, strict: bool = False) -> None:
    """Make `model` itself train planned: replaces `model.forward`, on this instance, until `uninstall(model)`.

    state_dict, parameters, submodules, hooks on the model, `functional_call`, eval and `generate` stay as they are: calls
    that no plan was made for run the replaced forward. A deep copy or an unpickled model trains planned, too.

    Args:
        model: what `plan` was called with.
        planned: modules that `plan` or `apply` returned for it, one per kind of call (several batch shapes, for example);
            the first that was made for a call runs it.
        strict: a training call that no plan was made for is a MismatchError instead of a warning.

    Raises:
        InputError: a planned module was made from another model, or none was given.
    """
    arguments.check_model(model)
    arguments.check_flags(strict=strict)
    if not planned:
        raise InputError("install needs at least one planned module: install(model, plan(model, budget, args, kwargs))")
    for module in planned:
        arguments.check_planned(module, CheckpointedModule, "install")
        if isinstance(module.original, WithCriterion):
            raise InputError(
                "a module planned with criterion= returns (loss, output), which model.forward does not: call the planned "
                "module, loss, output = planned(*args, criterion_args=(y,))"
            )
        if module.original is not model:
            raise InputError(
                f"install(model, planned) needs the model that was planned: this plan was made from another "
                f"{type(module.original).__name__} object"
            )
    uninstall(model)
    before = vars(model).get("forward")
    every = [one for module in planned for one in (module, *module.alternatives)]
    plans = [(module.step, module.plan, module.executable, module.audits) for module in every]
    vars(model)["forward"] = PlannedForward(model, plans, before, strict, planned)


def uninstall(model: nn.Module) -> None:
    """Undo `install`; does nothing where nothing is installed.

    Args:
        model: what `install` was called with.
    """
    arguments.check_model(model)
    forward = vars(model).get("forward")
    if isinstance(forward, PlannedForward):
        forward.restore()


def unplan(model: nn.Module) -> None:
    """Undo every `install` in a model: its own, and those of its submodules, as `plan_units` makes them.

    Args:
        model: the user's model.
    """
    arguments.check_model(model)
    for module in model.modules():
        uninstall(module)
