"""PlannedUnits: a model whose units were planned, and what can be done with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from planner import arguments
from planner.composite.training_step import Autocast
from planner.composite.trial import Made
from planner.composite.verify import verify_units
from planner.results.plan import Plan
from planner.results.unit_plan import UnitPlan
from planner.results.verify_report import VerifyReport
from planner.runtime.found_gradients import FoundGradients
from planner.runtime.in_flight import InFlight
from planner.runtime.install import install, uninstall, unplan
from planner.runtime.module import CheckpointedModule
from planner.tracer.loss import Loss


def _within(plan: Plan, spare_bytes: int, num_calls: int) -> Plan:
    """A unit's plan, whose budget is its own peak, with what the step leaves: for gradients in other layouts, or an audit."""
    return replace(plan, budget_bytes=plan.budget_bytes + spare_bytes, num_calls=num_calls)


class PlannedUnits:
    """A model whose units are planned one by one, each called by the model's own code. Prints as a table.

    Attributes:
        model: the user's model; `install()` makes it train planned, in place.
        planned: the planned units, by qualified name.
        plan: how each of them runs, and what the step takes.
    """

    def __init__(self, model: nn.Module, plan: UnitPlan, made: Mapping[str, Made], loss: Loss, autocast: Autocast) -> None:
        """`loss`, `autocast`: the output that backward starts from, and the autocast of the step, as it was planned."""
        self.model, self.plan, self._loss = model, plan, loss
        self._cast = autocast
        counts = Counter(call.unit for call in plan.outer.calls)
        self.planned: dict[str, CheckpointedModule] = {
            name: CheckpointedModule(
                model.get_submodule(name), step, _within(own, plan.spare_bytes[name], counts[name]), executable=executable
            )
            for name, (step, own, executable) in made.items()
        }
        found = FoundGradients(plan.whole, type(model).__name__, list(model.parameters()))
        for name, module in self.planned.items():
            module.__dict__["_found_gradients"] = found  # which speaks once for all units
            module.__dict__["_in_flight"] = InFlight(module.original, f"{name} of {type(model).__name__}")

    @property
    def budget_bytes(self) -> int:
        """Bound on everything live on the device during a step."""
        return self.plan.budget_bytes

    @property
    def plain_bytes(self) -> int | None:
        """Measured peak of the plain step; None where it did not fit on the device, or none was run."""
        return self.plan.plain_bytes

    @property
    def peak_bytes(self) -> int:
        """Measured peak of the planned step."""
        return self.plan.peak_bytes if self.plan.measured_bytes is None else self.plan.measured_bytes

    @property
    def left(self) -> Mapping[str, str]:
        """The submodules that run as they are, and why."""
        return self.plan.left

    def install(self, *, strict: bool = False) -> None:
        """Let the model train with its planned units, in place of all plans installed in it before; see `planner.install`."""
        arguments.check_flags(strict=strict)
        unplan(self.model)
        for module in self.planned.values():
            install(module.original, module, strict=strict)

    def uninstall(self) -> None:
        """Undo `install`."""
        for module in self.planned.values():
            uninstall(module.original)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; `planner.apply_units(UnitPlan.load(path), model, args, kwargs)` applies it.

        Raises:
            InputError: the file cannot be written.
        """
        self.plan.save(path)

    def verify(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> VerifyReport:
        """Run plain and planned steps on copies of the model, from the same state, and compare them bit for bit.

        Three successive steps each. Compared after each: outputs, gradients, parameters, buffers, attributes of modules and
        the random generators. Steps run under the autocast of the plan; the model stays as it is.

        Args:
            args, kwargs: the call that the units were planned for.

        Raises:
            InputError: the model cannot be copied, or has no such call.
        """
        return verify_units(self, *arguments.check_call(args, kwargs), self._loss, self._cast)

    def __str__(self) -> str:
        return str(self.plan)
