"""PlannerCallback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any, Unpack

from planner.analysis.budgets import Budget
from planner.errors import InputError
from planner.integrations.first_call import FirstCall, Planned, checked_options, plans, warn_unplanned, watch
from planner.options import PlanKeywords, with_options
from planner.runtime.module import CheckpointedModule

try:
    from transformers import TrainerCallback
    from transformers.training_args import ParallelMode
except ImportError as error:
    raise InputError(f"install the extra: pip install 'checkpoint-planner[transformers]' ({error})") from error


class PlannerCallback(TrainerCallback):
    """Trains a Trainer's model within a budget: `Trainer(..., callbacks=[PlannerCallback("20GiB")])`.

    The model is planned for the first call that the Trainer makes in training, with its autocast and arguments, and runs
    planned until training ends; then its forward is what it was. Evaluation and generation run the model's own forward. The
    plan's table is printed once; `state.log_history` and the next log that is printed have entries `planner/...`. If the call
    cannot be planned, a warning says why, and training goes on as without the callback.

    Attributes:
        planned: the planned module; None before it is planned, and where it cannot be.
    """

    @with_options(PlanKeywords)
    def __init__(self, budget: Budget, **options: Unpack[PlanKeywords]) -> None:
        """A callback for one Trainer.

        Args:
            budget: as for `planner.plan`.
            options: see below. `dynamic` is True unless given, and `accumulate` where the Trainer accumulates gradients.

        Raises:
            TypeError, BudgetError, InputError: a budget or an option that no model could be planned with.
        """
        self._budget, self._options = budget, checked_options(budget, options, "PlannerCallback")
        self._first: FirstCall | None = None
        self._unlogged: dict[str, Any] = {}
        self.planned: CheckpointedModule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watch the model for its first call in training."""
        self._stop()  # of a training that ended with an error

        def done(planned: Planned) -> None:
            self.planned = planned.module
            if state.is_world_process_zero:
                print(planned.module.plan)
            note(planned.metrics)

        def failed(error: Exception) -> None:
            warn_unplanned(model, error)
            note({"planner/error": f"{type(error).__name__}: {error}"})

        def note(entry: dict[str, Any]) -> None:
            self._unlogged.update(entry)
            state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})

        if args.n_gpu > 1 and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            failed(InputError("the Trainer uses DataParallel, which copies the model at each call: start it with torchrun"))
            return
        options: PlanKeywords = {"accumulate": args.gradient_accumulation_steps > 1, **self._options}
        self._first = watch(model, plans(model, self._budget, options), options.get("strict", False), done, failed)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what is new to what is printed."""
        if logs is not None:
            logs.update(self._unlogged)
            self._unlogged = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model back as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._first is not None:
            self._first.stop()
            self._first = None
