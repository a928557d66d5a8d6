"""PlannerCallback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any, Unpack

from torch import nn

from planner.analysis.budgets import Budget
from planner.api import plan
from planner.errors import InputError, PlannerError
from planner.integrations.first_call import (
    FirstCall,
    PlannedAtFirstCall,
    checked_options,
    counted_optimizers,
    warn_unplanned,
    watch,
)
from planner.options import PlanKeywords, with_options
from planner.runtime.module import CheckpointedModule

try:
    from transformers import TrainerCallback
    from transformers.training_args import ParallelMode
except ImportError as error:
    raise InputError(f"install the extra: pip install 'checkpoint-planner[transformers]' ({error})") from error


def _checkpoints_itself(model: Any) -> bool:
    """Whether one of transformers' own modules is switched to recompute; its name for that differs from version to version."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(vars(module).get(f"{kind}_checkpointing") for module in modules for kind in ("gradient", "activation"))


class PlannerCallback(TrainerCallback):
    """Trains a Trainer's model within a budget: `Trainer(..., callbacks=[PlannerCallback("20GiB")])`.

    The model is planned for the first call that the Trainer makes in training, with its autocast and arguments, and runs
    planned until training ends; then its forward is what it was. Evaluation and generation run the model's own forward. The
    plan's table is printed once; `state.log_history` and the next log that is printed have entries `planner/...`. If the call
    cannot be planned, a warning says why, and training goes on as without the callback.
    """

    @with_options(PlanKeywords)
    def __init__(self, budget: Budget, **options: Unpack[PlanKeywords]) -> None:
        """A callback for one Trainer.

        Args:
            budget: as for `planner.plan`. The state of the Trainer's optimizer counts against it, unless `optimizer` is given.
            options: see below. `dynamic` is True unless given, and `accumulate` where the Trainer accumulates gradients.

        Raises:
            TypeError, BudgetError, InputError: a budget or an option that no model could be planned with.
        """
        self._budget, self._options = budget, checked_options(budget, options, "PlannerCallback")
        self._first: FirstCall | None = None
        self._found: PlannedAtFirstCall | None = None
        self._unlogged: dict[str, Any] = {}

    @property
    def planned(self) -> CheckpointedModule | None:
        """The planned module; None before it is planned, and where it cannot be."""
        return None if self._found is None else self._found.module

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Watch the model for its first call in training."""
        self._stop()  # of a training that ended with an error
        self._found = None

        def done(found: PlannedAtFirstCall) -> None:
            self._found = found
            if state.is_world_process_zero:
                print(found.module.plan)
            self._note(state, found.metrics)

        def failed(error: Exception) -> None:
            if _checkpoints_itself(model) and isinstance(error, PlannerError):
                cure = "switch the model's own checkpointing off (activation_checkpointing or gradient_checkpointing=False)"
                error = InputError(f"{cure}: the plan chooses what to recompute. With it: {error}")
            warn_unplanned(model, error)
            self._note(state, {"planner/error": f"{type(error).__name__}: {error}"})

        def make(call_args: Any, call_kwargs: Any) -> CheckpointedModule:
            options: PlanKeywords = {"accumulate": args.gradient_accumulation_steps > 1, **self._options}
            if "optimizer" not in options and optimizer is not None:
                options["optimizer"] = counted_optimizers(model, [optimizer]) or None
            return plan(model, self._budget, call_args, call_kwargs, **options)

        if args.n_gpu > 1 and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            failed(InputError("the Trainer uses DataParallel, which copies the model at each call: start it with torchrun"))
        else:
            self._first = watch(model, make, self._options.get("strict", False), done, failed)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what is new to what is printed."""
        if self._found is not None and (pauses := self._found.new_pauses()):
            self._note(state, pauses)
        if logs is not None:
            logs.update(self._unlogged)
            self._unlogged = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model back as it was."""
        self._stop()

    def _note(self, state: Any, entry: dict[str, Any]) -> None:
        """Add an entry to the Trainer's history, and to the next log."""
        self._unlogged.update(entry)
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})

    def _stop(self) -> None:
        if self._first is not None:
            self._first.stop()
            self._first = None
