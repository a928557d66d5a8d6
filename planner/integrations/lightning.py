"""PlannerCallback for Lightning's Trainer, of the package `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from planner import units
from planner.analysis.budgets import Budget
from planner.api import plan
from planner.errors import InputError
from planner.integrations.first_call import (
    FirstCall,
    PlannedAtFirstCall,
    checked_options,
    counted_optimizers,
    warn_unplanned,
    watch,
)
from planner.options import PlanKeywords, with_options
from planner.profiler.optimizer import state_bytes, trains
from planner.runtime.module import CheckpointedModule

if TYPE_CHECKING or sys.modules.get("pytorch_lightning"):  # the one that the script uses, if both are installed
    from pytorch_lightning import Callback, LightningModule
else:
    try:
        from lightning.pytorch import Callback, LightningModule
    except ImportError:
        try:
            from pytorch_lightning import Callback, LightningModule
        except ImportError as error:
            raise InputError(f"install the extra: pip install 'checkpoint-planner[lightning]' ({error})") from error


class PlannerCallback(Callback):
    """Trains a LightningModule's network within a budget: `Trainer(callbacks=[PlannerCallback("20GiB")])`.

    What is planned is the call that `training_step` makes: of the LightningModule's own forward, or of its only submodule that
    is trained. It is planned when `training_step` first makes it, with its autocast and arguments, and runs planned until
    training ends; then its forward is what it was. Validation runs the model's own forward. The plan's table is printed once,
    and every logger is given `planner/...` metrics. If the call cannot be planned, a warning says why, and training goes on as
    without the callback.
    """

    @with_options(PlanKeywords)
    def __init__(self, budget: Budget, *, module: str | None = None, **options: Unpack[PlanKeywords]) -> None:
        """A callback for one Trainer.

        Args:
            budget: as for `planner.plan`. Weights and gradients of the LightningModule outside of what is planned count against
                it, and so does the state of its optimizers, unless `optimizer` is given.
            module: qualified name of the submodule to plan, where `training_step` calls several.
            options: see below; `dynamic` and `accumulate` are True unless given.

        Raises:
            TypeError, BudgetError, InputError: a budget or an option that no model could be planned with.
        """
        self._budget, self._module, self._options = budget, module, checked_options(budget, options, "PlannerCallback")
        self._watched: list[FirstCall] = []
        self._found: PlannedAtFirstCall | None = None

    @property
    def planned(self) -> CheckpointedModule | None:
        """The planned module; None before it is planned, and where it cannot be."""
        return None if self._found is None else self._found.module

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch for the first call in training."""
        self._stop()  # of a training that ended with an error
        self._found = None

        def done(found: PlannedAtFirstCall) -> None:
            self._found = found
            pl_module.print(found.module.plan)
            _log(trainer, found.metrics)

        def failed(error: Exception) -> None:
            warn_unplanned(pl_module, error)

        known = dict(pl_module.named_modules())
        if self._module is not None and self._module not in known:
            raise InputError(f"module={self._module!r} is no submodule of {type(pl_module).__name__}: {', '.join(known)[:200]}")
        for name in [self._module] if self._module is not None else _called(pl_module):
            make = partial(self._make, trainer, pl_module, name)
            strict = self._options.get("strict", False)
            self._watched.append(watch(pl_module.get_submodule(name), make, strict, done, failed))

    def _make(self, trainer: Any, pl_module: Any, name: str, args: Any, kwargs: Any) -> CheckpointedModule:
        """Plan for the first call that `training_step` makes."""
        for first in self._watched:
            first.stop()
        others = [child for child in _called(pl_module) if child and child != name]
        if self._module is None and name and others:
            raise InputError(
                f"training_step calls {name} by itself, and {' and '.join(others)} is trained too: call them in the "
                f"LightningModule's forward, and self(...) in training_step; or plan one of them, PlannerCallback(budget, "
                f"module={name!r}), and set aside with reserve= what the others save"
            )
        module = pl_module.get_submodule(name)
        # gradients of the last step are there in the forward: Lightning clears them between forward and backward
        options: PlanKeywords = {"accumulate": True, **self._options}
        beside = _bytes_beside(pl_module, module)
        if "optimizer" not in options:
            counted = counted_optimizers(pl_module, trainer.optimizers)
            options["optimizer"] = tuple(each for each in counted if trains(each, module)) or None
            beside += sum(state_bytes(pl_module, each) for each in counted if not trains(each, module))
        options["reserve"] = units.parse_bytes(options.get("reserve", 0), "reserve", least=0) + beside
        return plan(module, self._budget, args, kwargs, **options)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the captures of other sizes."""
        if self._found is not None and (pauses := self._found.new_pauses()):
            _log(trainer, pauses)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the network back as it was."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the network back as it was."""
        self._stop()

    def _stop(self) -> None:
        for first in self._watched:
            first.stop()
        self._watched = []


def _log(trainer: Any, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _called(pl_module: nn.Module) -> list[str]:
    """What `training_step` may call: "" for the LightningModule's own forward, and names of its submodules that are trained."""
    own = [""] if type(pl_module).forward is not LightningModule.forward else []
    return own + [name for name, child in pl_module.named_children() if any(p.requires_grad for p in child.parameters())]


def _bytes_beside(pl_module: nn.Module, module: nn.Module) -> int:
    """Bytes of weights, buffers and gradients that lie outside of a submodule."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    others = [tensor for tensor in (*pl_module.parameters(), *pl_module.buffers()) if id(tensor) not in own]
    return sum(tensor.nbytes * (2 if tensor.requires_grad else 1) for tensor in others)
